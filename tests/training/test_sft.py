"""Packing changes the rows, not the numbers."""

import json

import pytest

from tests.distributed import run
from training import sft


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("layout", "values"), [((1, 1, 1), {}), ((2, 2, 1), {"sequence_parallel": True}),
                                                ((1, 2, 2), {"micro_batch_size": 1})])
def test_packed_training_equals_unpacked_training(small_run, tmp_path, layout, values):
    """Four steps: loss, gradient norm and, since weights follow from them, the held-out loss at the end; fp32 rounding."""
    settings = dict(layout=layout[:2], iterations=4, eval_every=4, seq_length=96, global_batch_size=16, **values)
    for packing in (True, False):
        run(sft.run, *layout, small_run.sft(tmp_path / str(packing), packing=packing, **settings))
    packed, alone = rows(tmp_path / "True"), rows(tmp_path / "False")
    for ours, expected in zip(packed, alone, strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert ours["packing_efficiency"] > expected["packing_efficiency"]
    assert packed[-1]["heldout_loss"] == pytest.approx(alone[-1]["heldout_loss"], rel=1e-5)
