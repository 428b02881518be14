"""How an iteration's samples are divided: into minibatches (one optimizer step), data-parallel ranks, and rows of a forward pass.

Every rank holds all samples, one a row, padded; the models see this rank's rows of a ``Plan``. Without a token budget such a row is
one sample. With ``micro_batch_tokens`` it holds several, each a document that sees only itself, and is a micro-batch: sorted by length
and spread longest first into the shortest row (training.data.packing), so that all ranks have as many rows of about equal length and
pipeline messages have one shape. Losses are sums over tokens with one denominator: they do not depend on the plan.

The scoring passes and the updates of a minibatch use the same rows. So the first minibatch's ratio is 1 exactly, not to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from training import parallel
from training.config import RolloutConfig
from training.data.batches import padded_length, shard
from training.data.packing import pack
from training.start import length_multiple
from training.step import Batch, Read, look

Rows = list[list[int]]
"""The samples of each row, by their number in the iteration; a row may be empty (ranks need equally many)."""


@dataclass(frozen=True)
class Plan:
    """This data-parallel rank's rows."""

    lengths: list[int]
    """Tokens of every sample of the iteration."""
    minibatches: list[Rows]
    length: int
    """Tokens of a row, padding included."""
    size: int
    """Rows of a micro-batch."""
    packed: bool
    """Whether rows hold several samples."""
    efficiency: float
    """Tokens of samples / tokens computed, over all ranks."""

    def micro_batches(self, batch: Batch, minibatch: int) -> list[Batch]:
        """This rank's rows (size, length) of minibatch ``minibatch`` of the samples ``batch`` (B, T); "documents" where packed."""
        return self._rows(batch, self.minibatches[minibatch])

    def look(self, model, batch: Batch, read: Read) -> torch.Tensor:
        """``read``'s numbers of every sample, (B, T) on the CPU, 0 at padding: each rank's rows, summed over ranks. A collective."""
        rows = [row for minibatch in self.minibatches for row in minibatch]
        values = look(model, self._rows({name: batch[name] for name in ("tokens", "response_mask")}, rows), read)
        place = self._place(rows, batch["tokens"].size(1)).to(values.device)
        whole = torch.zeros(batch["tokens"].numel(), device=values.device)
        whole[place[place >= 0]] = values[place >= 0]
        return parallel.sum_over_data(whole).view(batch["tokens"].shape).cpu()

    def _rows(self, batch: Batch, rows: Rows) -> list[Batch]:
        width = batch["tokens"].size(1)
        place = self._place(rows, width)
        made = {name: torch.where(place >= 0, values.reshape(-1)[place.clamp(min=0)], torch.zeros((), dtype=values.dtype))
                for name, values in batch.items() if values.shape == batch["tokens"].shape}
        if self.packed:
            ends = [torch.tensor([self.lengths[sample] for sample in row], dtype=torch.long).cumsum(0) for row in rows]
            made["documents"] = torch.stack([torch.searchsorted(end, torch.arange(self.length), right=True) for end in ends])
        return [{name: values[first : first + self.size] for name, values in made.items()} for first in range(0, len(rows), self.size)]

    def _place(self, rows: Rows, width: int) -> torch.Tensor:
        """(rows, length): where each token stands in the flattened samples of ``width``, -1 at padding."""
        place = torch.full((len(rows), self.length), -1)
        for line, row in zip(place, rows, strict=True):
            start = 0
            for sample in row:
                line[start : start + self.lengths[sample]] = sample * width + torch.arange(self.lengths[sample])
                start += self.lengths[sample]
        return place


def plan(config: RolloutConfig, lengths: list[int], minibatch: int) -> Plan:
    """The rows of samples of ``lengths`` in minibatches of ``minibatch`` samples; the same call on every rank."""
    ranks, size = parallel.data_ranks(), 1 if config.micro_batch_tokens else config.micro_batch_size
    # The interleaved schedule takes micro-batches in groups of the pipeline's size.
    unit = ranks * size * (config.pipeline_parallel if config.virtual_pipeline > 1 else 1)
    minibatches: list[Rows] = []
    for first in range(0, len(lengths), minibatch):
        part = lengths[first : first + minibatch]
        rows = pack(part, config.micro_batch_tokens, unit) if config.micro_batch_tokens else [[sample] for sample in range(len(part))]
        rows += [[] for _ in range(-len(rows) % unit)]
        minibatches.append([[first + sample for sample in row] for row in rows])
    length = padded_length([sum(lengths[sample] for sample in row) for rows in minibatches for row in rows], length_multiple(config))
    efficiency = sum(lengths) / (length * sum(map(len, minibatches)))
    return Plan(lengths, [shard(rows, parallel.data_rank(), ranks) for rows in minibatches], length, size,
                bool(config.micro_batch_tokens), efficiency)
