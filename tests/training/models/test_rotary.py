"""The rotary embedding's positions: they begin again with each document, and why."""

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd as rotate

from training.config.rope import Rope
from training.models import rotary

ROPE, DIM = Rope(100000.0), 64
CPU = torch.device("cpu")


def test_positions_count_from_each_document():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3], [5, 5, 5, 5, 5, 5, 5, 5]])
    assert rotary.of_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    whole = rotary.angles(ROPE, DIM, 8, None, CPU)
    assert torch.equal(rotary.angles(ROPE, DIM, 8, rotary.of_documents(ids), CPU)[:5, 1:], whole[:5])


def scores(offset: int, dtype: torch.dtype) -> torch.Tensor:
    """q . k of 128 tokens that stand from ``offset`` on, (128, 128) fp64, rotated as megatron-core
    does in ``dtype``."""
    query, key = (
        torch.randn(128, 1, 1, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1)
    )
    angles = rotary.angles(ROPE, DIM, offset + 128, torch.arange(offset, offset + 128)[None], CPU)
    query, key = (
        rotate(x, angles.to(torch.float64) if dtype == torch.float64 else angles)[:, 0, 0].double()
        for x in (query, key)
    )
    return query @ key.T


def test_a_score_depends_on_the_distance_alone_but_for_rounding():
    """Packing needs no reset except for rounding: 5e-5 at 8,000 tokens, that of the fp32 angles; in
    bf16 half a percent wherever a row stands, as much as rounding sines and cosines costs anyway.
    With the reset a packed row's angles are the very same numbers."""
    exact = scores(0, torch.float64)

    def error(offset, dtype):
        return ((scores(offset, dtype) - scores(0, dtype)).norm() / exact.norm()).item()

    assert error(8000, torch.float64) < 1e-4 and error(8000, torch.float32) < 1e-4
    assert 1e-3 < error(100, torch.bfloat16) < 1e-2 and error(8000, torch.bfloat16) < 1e-2
