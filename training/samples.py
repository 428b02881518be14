"""How an iteration's samples are divided: into minibatches (one optimizer step), data-parallel ranks, and rows of a forward pass.

Every rank holds all samples, one a row, padded; the models see this rank's rows of a ``Plan``. Without a token budget such a row is
one sample. With ``micro_batch_tokens`` it holds several, each a document that sees only itself: a minibatch is sorted by length and spread,
longest first into the shortest row (training.data.packing), so that all ranks have as many rows of about equal length, and messages
between pipeline stages one shape. Losses are sums over tokens with one denominator: they do not depend on the plan.

Rows are as long as the longest sample may be, not as long as the budget: attention that computes masked pairs (SDPA) takes time with
the square of it. The scoring passes and the updates of a minibatch use the same micro-batches. So the first minibatch's ratio is 1
exactly, not to rounding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from training import pace, parallel
from training.config import RolloutConfig
from training.data.batches import padded_length, shard
from training.data.packing import Layout, Limits, lay_out
from training.shape import Shape
from training.start import least_tokens, length_multiple
from training.step import Batch, Read, look


@dataclass(frozen=True)
class Plan:
    """This data-parallel rank's rows."""

    lengths: list[int]
    """Tokens of every sample of the iteration."""
    minibatches: list[Layout]
    """Rows of samples, by their number in the iteration; a row may be empty (ranks need equally many)."""
    packed: bool
    """Whether rows hold several samples."""
    efficiency: float
    """Tokens of samples / tokens computed, over all ranks."""

    def micro_batches(self, batch: Batch, minibatch: int) -> list[Batch]:
        """This rank's micro-batches (rows, length) of a minibatch of the samples ``batch`` (B, T); "documents" where packed."""
        return self._made(batch, self.minibatches[minibatch])

    def look(self, model, batch: Batch, read: Read) -> torch.Tensor:
        """``read``'s numbers of every sample, (B, T) on the CPU, 0 at padding: each rank's rows, summed over ranks. A collective."""
        seen = {name: batch[name] for name in ("tokens", "response_mask")}
        whole = torch.zeros(batch["tokens"].numel(), device=parallel.device())
        for _, alike in itertools.groupby(self.minibatches, key=lambda layout: layout[1:]):  # of one shape: one run of the pipeline
            layouts = list(alike)
            values = look(model, [micro for layout in layouts for micro in self._made(seen, layout)], read)
            place = torch.cat([self._place(layout, batch["tokens"].size(1)) for layout in layouts]).to(values.device)
            whole[place[place >= 0]] = values[place >= 0]
        return parallel.sum_over_data(whole).view(batch["tokens"].shape).cpu()

    def _made(self, batch: Batch, layout: Layout) -> list[Batch]:
        place = self._place(layout, batch["tokens"].size(1))
        made = {name: torch.where(place >= 0, values.reshape(-1)[place.clamp(min=0)], torch.zeros((), dtype=values.dtype))
                for name, values in batch.items() if values.shape == batch["tokens"].shape}
        if self.packed:
            ends = [torch.tensor([self.lengths[sample] for sample in row], dtype=torch.long).cumsum(0) for row in layout.rows]
            made["documents"] = torch.stack([torch.searchsorted(end, torch.arange(layout.length), right=True) for end in ends])
        size = layout.micro_batch_size
        return [{name: values[first : first + size] for name, values in made.items()} for first in range(0, len(layout.rows), size)]

    def _place(self, layout: Layout, width: int) -> torch.Tensor:
        """(rows, length): where each token stands in the flattened samples of ``width``, -1 at padding."""
        place = torch.full((len(layout.rows), layout.length), -1)
        for line, row in zip(place, layout.rows, strict=True):
            start = 0
            for sample in row:
                line[start : start + self.lengths[sample]] = sample * width + torch.arange(self.lengths[sample])
                start += self.lengths[sample]
        return place


def plan(config: RolloutConfig, shape: Shape, lengths: list[int], minibatch: int) -> Plan:
    """The rows of samples of ``lengths`` in minibatches of ``minibatch`` samples; the same call on every rank."""
    ranks, multiple, packed = parallel.data_ranks(), length_multiple(config), bool(config.micro_batch_tokens)
    group = pace.group(config)
    capacity = config.prompt_length + config.response_length
    limits = Limits(capacity, multiple, ranks, max(1, config.micro_batch_tokens // padded_length([capacity], multiple)),
                    config.pipeline_parallel, group, least_tokens(config, shape))
    layouts: list[Layout] = []
    for first in range(0, len(lengths), minibatch):
        part = lengths[first : first + minibatch]
        if packed:
            layout = lay_out(part, limits)
        else:
            layout = alone(len(part), padded_length(lengths, multiple), config.micro_batch_size, ranks * group)
        layouts.append(layout._replace(rows=[[first + sample for sample in row] for row in layout.rows]))
    efficiency = sum(lengths) / sum(len(layout.rows) * layout.length for layout in layouts)
    return Plan(lengths, [layout._replace(rows=shard(layout.rows, parallel.data_rank(), ranks)) for layout in layouts], packed, efficiency)


def alone(count: int, length: int, size: int, unit: int) -> Layout:
    """One sample a row; empty rows up to a multiple of ``unit`` micro-batches of ``size`` rows."""
    return Layout([[sample] for sample in range(count)] + [[] for _ in range(-count % (size * unit))], length, size)
