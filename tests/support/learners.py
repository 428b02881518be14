"""Learners without a run folder, for tests of checkpoints: their contents are numbers that any
layout can check."""

from __future__ import annotations

import torch

from training.checkpoint import format
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.models.bloom import table
from training.optim.boxes import boxes
from training.trainer.step import Learner, build_model

SHAPE = table.shape(layers=4, hidden=48, heads=6, vocab=300, norm_eps=1e-5)
"""Odd: six heads, and a vocabulary whose padding depends on TP."""


def settings(stage, layout=(1, 1), **values) -> SFTConfig:
    small = dict(
        precision="bf16", iterations=100, micro_batch_size=1, global_batch_size=8, warmup_iterations=0, save_every=1
    )
    return SFTConfig(
        paths=Paths(str(stage), "", "", "", ""),
        tensor_parallel=layout[0],
        pipeline_parallel=layout[1],
        **(small | values),
    )


def learner(config: SFTConfig, shape: Shape = SHAPE) -> Learner:
    """Weights zero, Adam's moments made."""
    model = build_model(shape, config, "lm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    made = Learner(model, config, 1e-3, 100, 0)
    made.optimizer._init_optimizer_states_with_dummy_values()
    return made


def held(made: Learner) -> list:
    """This rank's tensors, as a checkpoint names and places them."""
    state = format.sharded(made, is_loading=False)
    return [*state["model"].values(), *state["optimizer"]["param_state"].values()]


def expected(tensor, iteration: int) -> torch.Tensor:
    """What element (i, j, ...) of tensor ``key`` of a whole model holds at ``iteration``: a hash of
    its place, exact in bf16."""
    kind = {"optimizer.state.param": 1, "optimizer.state.exp_avg_sq": 3, "optimizer.state.exp_avg": 2}
    salt = next((number for prefix, number in kind.items() if tensor.key.startswith(prefix + ".")), 0) + len(tensor.key)
    values = torch.full(tensor.data.shape, (7 * iteration + salt) % 101)
    extra = tensor.prepend_axis_num
    for axis, start in enumerate(tensor.global_offset):
        steps = torch.arange(tensor.data.size(axis - extra)) if axis >= extra else torch.zeros(1, dtype=torch.long)
        place = (start + steps) * (3 + 2 * axis)
        values = values + (place.view(-1, *[1] * (tensor.data.dim() - 1 - (axis - extra))) if axis >= extra else place)
    values = (values % 127).to(tensor.data.dtype)
    if "word_embeddings" in tensor.key:  # rows of padding hold zero on every layout
        rows = tensor.global_offset[0] + torch.arange(tensor.data.size(0))
        values[rows >= SHAPE.vocab] = 0
    return values


@torch.no_grad()
def fill(made: Learner, iteration: int) -> None:
    for tensor in held(made):
        tensor.data.detach().copy_(expected(tensor, iteration))


def wrong(made: Learner, iteration: int) -> list[str]:
    """Names of this rank's tensors that do not hold what ``fill`` gave them at ``iteration``."""
    return [
        tensor.key for tensor in held(made) if not torch.equal(tensor.data.detach().cpu(), expected(tensor, iteration))
    ]


__all__ = ["SHAPE", "boxes", "expected", "fill", "held", "learner", "settings", "wrong"]
