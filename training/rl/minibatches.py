"""How an iteration's samples are divided: into minibatches (one optimizer step), data-parallel
ranks, and rows of a forward pass.

Every rank holds all samples, one a row, padded; the models see this rank's rows of a ``Plan``.
Without a token budget such a row is one sample. With ``micro_batch_tokens`` it holds several, each
a document that sees only itself: a minibatch is sorted by length and spread, longest first into the
shortest row (training.data.packing), so that all ranks have as many rows of about equal length, and
messages between pipeline stages one shape. Losses are sums over tokens with one denominator: they
do not depend on the plan.

Rows are as long as the longest sample may be, not as long as the budget: attention that computes
masked pairs (SDPA) takes time with the square of it. The scoring passes and the updates of a
minibatch use the same micro-batches. So the first minibatch's ratio is 1 exactly, not to rounding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from training.config import cost
from training.config.shape import Shape
from training.config.trainers import RolloutConfig
from training.data.batches import padded_length, shard
from training.data.packing import Layout, RowLimits, lay_out
from training.data.permutation import Permutation
from training.distributed import groups
from training.trainer.setup import least_tokens, length_multiple
from training.trainer.step import Batch, Read, look, on_device


@dataclass(frozen=True)
class Plan:
    """This data-parallel rank's rows."""

    lengths: list[int]
    """Tokens of every sample of the iteration."""
    minibatches: list[Layout]
    """Rows of samples, by their number in the iteration; a row may be empty (ranks need equally
    many)."""
    packed: bool
    """Whether rows hold several samples."""
    efficiency: float
    """Tokens of samples / tokens computed, over all ranks."""

    _places: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def micro_batches(self, batch: Batch, minibatch: int) -> list[Batch]:
        """This rank's micro-batches (rows, length) of a minibatch of the samples ``batch`` (B, T),
        both on the device; "documents" where packed."""
        layout = self.minibatches[minibatch]
        place, documents = self._laid_out(minibatch, batch["tokens"].size(1))
        made = {
            name: torch.where(place >= 0, values.reshape(-1)[place.clamp(min=0)], values.new_zeros(()))
            for name, values in batch.items()
            if values.shape == batch["tokens"].shape
        }
        if self.packed:
            made["documents"] = documents
        size = layout.micro_batch_size
        return [
            {name: values[first : first + size] for name, values in made.items()}
            for first in range(0, len(layout.rows), size)
        ]

    def look(self, model, batch: Batch, read: Read) -> torch.Tensor:
        """``read``'s numbers of every sample, (B, T) on the CPU, 0 at padding: each rank's rows,
        summed over ranks. A collective."""
        seen = on_device({name: batch[name] for name in ("tokens", "response_mask")})
        count, width = batch["tokens"].shape
        flat = torch.zeros(count * width + 1, device=groups.device())
        for _, alike in itertools.groupby(
            range(len(self.minibatches)), key=lambda number: self.minibatches[number][1:]
        ):
            chosen = list(alike)  # of one shape: one run of the pipeline
            values = look(model, [micro for number in chosen for micro in self.micro_batches(seen, number)], read)
            flat[torch.cat([self._laid_out(number, width)[0] for number in chosen])] = (
                values  # padding, -1, all goes to the last place
            )
        return groups.sum_over_data(flat)[:-1].view(count, width).cpu()

    def _laid_out(self, minibatch: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, length) each, on the device: where each token stands in the flattened samples of
        ``width``, -1 at padding; its sample's number in the row, that of padding is the next. Made
        once: four models score and two learn from the same rows."""
        if (minibatch, width) not in self._places:
            rows, length, _ = self.minibatches[minibatch]
            placed = [
                (sample, number, line, start)
                for line, row in enumerate(rows)
                for number, (sample, start) in enumerate(
                    zip(row, itertools.accumulate((self.lengths[sample] for sample in row), initial=0), strict=False)
                )
            ]
            sample, number, line, start = torch.tensor(placed, dtype=torch.long).view(-1, 4).unbind(1)
            sizes = torch.tensor(self.lengths)[sample]
            owner = torch.arange(len(placed)).repeat_interleave(sizes)
            inside = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
            at = line[owner] * length + start[owner] + inside
            place = torch.full((len(rows) * length,), -1)
            documents = torch.tensor([len(row) for row in rows]).repeat_interleave(length)
            place[at], documents[at] = sample[owner] * width + inside, number[owner]
            self._places[minibatch, width] = tuple(
                made.view(-1, length).to(groups.device()) for made in (place, documents)
            )
        return self._places[minibatch, width]


def plan(
    config: RolloutConfig, shape: Shape, lengths: list[int], minibatch: int, order: list[int] | None = None
) -> Plan:
    """The rows of samples of ``lengths`` in minibatches of ``minibatch`` samples, in ``order``
    (None: as they are); the same call on every rank."""
    order = list(range(len(lengths))) if order is None else order
    ranks, multiple, packed = groups.data_ranks(), length_multiple(config), bool(config.micro_batch_tokens)
    group = cost.group(config)
    capacity = config.prompt_length + config.response_length
    limits = RowLimits(
        capacity,
        multiple,
        ranks,
        max(1, config.micro_batch_tokens // padded_length([capacity], multiple)),
        config.pipeline_parallel,
        group,
        least_tokens(config, shape),
    )
    layouts: list[Layout] = []
    for first in range(0, len(lengths), minibatch):
        chosen = order[first : first + minibatch]
        part = [lengths[sample] for sample in chosen]
        if packed:
            layout = lay_out(part, limits)
        else:
            layout = one_layout(len(part), padded_length(lengths, multiple), config.micro_batch_size, ranks * group)
        layouts.append(layout._replace(rows=[[chosen[number] for number in row] for row in layout.rows]))
    efficiency = sum(lengths) / sum(len(layout.rows) * layout.length for layout in layouts)
    return Plan(
        lengths,
        [layout._replace(rows=shard(layout.rows, groups.data_rank(), ranks)) for layout in layouts],
        packed,
        efficiency,
    )


def epochs(config: RolloutConfig, shape: Shape, lengths: list[int], iteration: int) -> list[Plan]:
    """The minibatches of each pass over an iteration's samples: the first in their order, each
    later one in an order of its own, so that no two passes have the same minibatches (Andrychowicz
    et al. 2021; Huang et al. 2024)."""
    count, minibatch = len(lengths), config.global_batch_size
    orders = [
        None,
        *(
            Permutation(count, f"epoch {epoch} of iteration {iteration}, seed {config.seed}")[np.arange(count)].tolist()
            for epoch in range(1, config.epochs)
        ),
    ]
    return [plan(config, shape, lengths, minibatch, order) for order in orders]


def one_layout(count: int, length: int, size: int, unit: int) -> Layout:
    """One sample a row; empty rows up to a multiple of ``unit`` micro-batches of ``size`` rows."""
    return Layout([[sample] for sample in range(count)] + [[] for _ in range(-count % (size * unit))], length, size)
