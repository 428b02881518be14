"""Weights from the training layout (TP x PP, interleaved or not) to the generation's own
tensor-parallel size, all layers on each rank.

Everything stays within a model-parallel group: it holds the model once. Where a rank already has
what it needs, that is a view of the training weights; only the rest is received, a layer of every
pipeline stage at a time, so that all stages send at once. (megatron-core's ``swap_model_weights``
takes no interleaved pipeline, fails on tied embeddings from PP 1, and wants a second model.)
"""

from __future__ import annotations

import collections
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training.config.shape import Shape
from training.errors import ConfigError
from training.models import lora
from training.models.language_model import Interleaved, LanguageModel, model_chunks

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Tensors whose rows are padded to a multiple that depends on the tensor-parallel size."""


class Held(NamedTuple):
    """A tensor as a rank holds it: local shape and the dimension that is divided over
    tensor-parallel ranks, None if it is whole."""

    shape: tuple[int, ...]
    dim: int | None


class Move(NamedTuple):
    """[source, source + count) of member ``of``'s tensor ``name`` along ``dim`` -> [target, target
    + count) of member ``to``'s."""

    name: str
    of: int
    to: int
    dim: int
    source: int
    target: int
    count: int


def named_weights(model: LanguageModel | Interleaved) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters, layers numbered as in the whole model; low-rank adapters merged, for
    as long as the caller keeps them."""
    found = {}
    for part in model_chunks(model):
        numbers = {str(local): layer.layer_number - 1 for local, layer in enumerate(part.decoder.layers)}
        merged = {
            f"decoder.layers.{number}.{name}.weight": layer.merged() for name, number, layer in lora.adapted(part)
        }
        for name, parameter in part.named_parameters():
            if lora.ADAPTER_PREFIX in name:
                continue
            if name.startswith("decoder.layers."):
                local, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{numbers[local]}.{rest}"
            found[name] = merged.get(name, parameter)
    return found


Shapes = dict[str, list[tuple[int, ...]]]
"""Name -> the tensor's shape on each member."""


def plan(held: list[dict[str, Held]], training_size: int, size: int, shape: Shape) -> tuple[list[Move], Shapes]:
    """What moves between the members of a model-parallel group, and the shape of each tensor on
    each member afterwards.

    ``held``: what each member has, members in the order of (pipeline stage, tensor rank);
    generation rank = member % ``size``.
    """
    names = list(dict.fromkeys(name for one in held for name in one))
    moves, shapes = [], {}
    for name in names:
        owners = [member for member, one in enumerate(held) if name in one]
        local, dim = held[owners[0]][name]
        shapes[name] = []
        for member in range(len(held)):
            axis, each, wanted, first = dim or 0, local[dim or 0], local[dim or 0], 0
            if dim is not None:
                wanted = shape.padded_vocab(size) // size if name in VOCABULARY else each * training_size // size
                first = member % size * wanted
            shapes[name].append((*local[:axis], wanted, *local[axis + 1 :]))
            for rank in range(training_size if dim is not None else 1):
                start, end = max(first, rank * each), min(first + wanted, (rank + 1) * each)
                if start < end:
                    having = [owner for owner in owners if dim is None or owner % training_size == rank]
                    of = member if member in having else having[member % len(having)]
                    moves.append(Move(name, of, member, axis, start - rank * each, start - first, end - start))
    return moves, shapes


def rounds(moves: list[Move], training_size: int) -> list[list[Move]]:
    """The moves between members in the order that all of them follow: a layer of every pipeline
    stage, then the next of each."""
    numbers: dict[str, int] = {}
    counts: collections.Counter[int] = collections.Counter()
    found: dict[int, list[Move]] = {}
    for move in moves:
        layer, stage = ".".join(move.name.split(".")[:3]), move.of // training_size
        if layer not in numbers:
            numbers[layer], counts[stage] = counts[stage], counts[stage] + 1
        if move.of != move.to:
            found.setdefault(numbers[layer], []).append(move)
    return [found[number] for number in sorted(found)]


class Resharder:
    """Gives a rank its slice of the whole model for generation over ``size`` ranks. Making one is
    collective over all ranks."""

    def __init__(self, model: LanguageModel | Interleaved, shape: Shape, size: int):
        self.model = model
        self.model_group = parallel_state.get_model_parallel_group()
        self.members = dist.get_process_group_ranks(self.model_group)
        self.member = self.members.index(dist.get_rank())
        training_size = parallel_state.get_tensor_model_parallel_world_size()
        shape.check_tensor_parallel(size, "generation_tensor_parallel")
        self.group = generation_group(self.members, size)
        # the last stage's copy of the embedding
        self.skipped = ("output_layer.weight",) if shape.tied else ()
        here = {
            name: Held(
                tuple(parameter.shape),
                parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
            )
            for name, parameter in named_weights(model).items()
            if name not in self.skipped
        }
        held: list = [None] * len(self.members)
        dist.all_gather_object(held, here, group=self.model_group)
        moves, shapes = plan(held, training_size, size, shape)
        self.shapes = {name: on[self.member] for name, on in shapes.items()}
        self.kept = [move for move in moves if move.of == move.to == self.member]
        mine = [[move for move in one if self.member in (move.of, move.to)] for one in rounds(moves, training_size)]
        self.rounds = [one for one in mine if one]
        self.extra_bytes = 0
        """Memory that the last ``weights()`` took beside the training weights: what was received,
        and what adapters were merged into."""

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, on the device of the training weights. Collective over the model-parallel
        group."""
        have, made = named_weights(self.model), {}
        for move in self.kept:
            slice_ = _slice(have, move)
            if slice_.shape == self.shapes[move.name]:
                made[move.name] = slice_
        example = next(iter(have.values()))
        missing = {name: shape for name, shape in self.shapes.items() if name not in made}
        for name, shape in missing.items():  # rows that pad the vocabulary come from nobody
            make = torch.zeros if name in VOCABULARY else torch.empty
            made[name] = make(shape, dtype=example.dtype, device=example.device)
        shared = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.extra_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in made.values()
            if tensor.untyped_storage().data_ptr() not in shared
        )
        for move in self.kept:
            if move.name in missing:
                made[move.name].narrow(move.dim, move.target, move.count).copy_(_slice(have, move))
        for moves in self.rounds:
            self._exchange(moves, have, made)
        return made

    def _exchange(self, moves: list[Move], have, made) -> None:
        """One message for each pair of ranks, in the group of those that exchange anything: NCCL
        wants all of a group in its first call."""
        pairs: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            pairs.setdefault((move.of, move.to), []).append(move)
        operations, arriving = [], []
        for (of, to), several in pairs.items():
            if of == self.member:
                flat = torch.cat([_slice(have, move).reshape(-1) for move in several])
                operations.append(dist.P2POp(dist.isend, flat, self.members[to], self.model_group))
            else:
                places = [made[move.name].narrow(move.dim, move.target, move.count) for move in several]
                flat = places[0].new_empty(sum(place.numel() for place in places))
                operations.append(dist.P2POp(dist.irecv, flat, self.members[of], self.model_group))
                arriving.append((flat, places))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        for flat, places in arriving:
            for place, values in zip(places, flat.split([place.numel() for place in places]), strict=True):
                place.copy_(values.view(place.shape))


def _slice(have: dict[str, torch.nn.Parameter], move: Move) -> torch.Tensor:
    return have[move.name].detach().narrow(move.dim, move.source, move.count)


def generation_group(members: list[int], size: int):
    """The process group of this rank's ``size`` generation ranks, neighbours in the model-parallel
    group; None for one. Collective."""
    if len(members) % size:
        raise ConfigError(
            f"generation_tensor_parallel = {size} does not divide the {len(members)} ranks of tensor_parallel x "
            "pipeline_parallel; set it to 0 (as in training) or to a divisor"
        )
    if size == 1:
        return None
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, members)
    mine = None
    for ranks in dict.fromkeys(
        tuple(group[first : first + size]) for group in everyone for first in range(0, len(group), size)
    ):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            mine = group
    return mine
