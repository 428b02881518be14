"""Builds the next global batch while the trainer learns from this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from training.data.batches import Sampler
from training.distributed.groups import begin_thread

Batch = dict[str, torch.Tensor]
Make = Callable[[list[int]], tuple[list[Batch], dict[str, float]]]
"""Row indices of a global batch -> this data-parallel rank's micro-batches, and numbers on the
whole batch for the log."""


class Ready(NamedTuple):
    """One global batch."""

    micro_batches: list[Batch]
    """In pinned memory where there is a GPU, so that copies to it don't wait."""
    stats: dict[str, float]
    """Numbers on the whole batch, for the log."""
    state: dict
    """The sampler's state after this batch, for a checkpoint of this step: the sampler itself is
    further ahead."""


def prefetched(sampler: Sampler, make: Make, steps: int) -> Iterator[Ready]:
    """``steps`` global batches in the sampler's order. Another thread builds each while the one
    before it is in use.

    ``make`` runs in that thread: it must not talk to other ranks, nor rely on ``mcore_on_cpu``,
    which holds for one thread. Its exceptions are raised here. Close the iterator, or exhaust it,
    to end the thread."""

    def ahead() -> Ready:
        micro_batches, stats = make(sampler.next_batch())
        if torch.cuda.is_available():
            micro_batches = [{name: tensor.pin_memory() for name, tensor in micro.items()} for micro in micro_batches]
        return Ready(micro_batches, stats, sampler.state_dict())

    with ThreadPoolExecutor(1, "data", begin_thread()) as thread:
        coming = thread.submit(ahead)
        for step in range(steps):
            ready = coming.result()
            if step + 1 < steps:
                coming = thread.submit(ahead)
            yield ready
