"""Reshard weights from the training layout (TP x PP, interleaved or not) to generation's own
tensor-parallel size, with all layers on each rank.

All messages stay within a model-parallel group, which holds the model once. What a rank already has
becomes a view of its training weights; it receives only the rest. Ranks exchange a layer of every
pipeline stage at a time, so that all stages send at once. (megatron-core's ``swap_model_weights``
takes no interleaved pipeline, fails on tied embeddings from PP 1, and needs a second model.)
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


class LocalTensor(NamedTuple):
    """A rank's part of a tensor: its local shape, and the dimension that tensor-parallel ranks
    divide (None: the rank has the whole tensor)."""

    shape: tuple[int, ...]
    dim: int | None


class Move(NamedTuple):
    """Copy [source, source + count) along ``dim`` of member ``of``'s tensor ``name`` to [target,
    target + count) of member ``to``'s."""

    name: str
    of: int
    to: int
    dim: int
    source: int
    target: int
    count: int


def named_weights(model: LanguageModel | Interleaved) -> dict[str, torch.nn.Parameter]:
    """Name -> this rank's parameter, with layers numbered as in the whole model.

    Low-rank adapters are merged into new tensors, which live as long as the caller holds them.
    """
    weights = {}
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
            weights[name] = merged.get(name, parameter)
    return weights


Shapes = dict[str, list[tuple[int, ...]]]
"""Name -> the tensor's shape on each member."""


def plan(
    members: list[dict[str, LocalTensor]], training_size: int, size: int, shape: Shape
) -> tuple[list[Move], Shapes]:
    """Moves between the members of a model-parallel group, and each tensor's shape on each member
    afterwards.

    ``members``: each member's tensors, in the order of (pipeline stage, tensor rank). A member's
    generation rank is member % ``size``.
    """
    names = list(dict.fromkeys(name for tensors in members for name in tensors))
    moves, shapes = [], {}
    for name in names:
        owners = [member for member, tensors in enumerate(members) if name in tensors]
        local, dim = members[owners[0]][name]
        shapes[name] = []
        for member in range(len(members)):
            axis, local_length, length, first = dim or 0, local[dim or 0], local[dim or 0], 0
            if dim is not None:
                length = (
                    shape.padded_vocab(size) // size if name in VOCABULARY else local_length * training_size // size
                )
                first = member % size * length
            shapes[name].append((*local[:axis], length, *local[axis + 1 :]))
            for rank in range(training_size if dim is not None else 1):
                start, end = max(first, rank * local_length), min(first + length, (rank + 1) * local_length)
                if start < end:
                    holders = [owner for owner in owners if dim is None or owner % training_size == rank]
                    of = member if member in holders else holders[member % len(holders)]
                    moves.append(Move(name, of, member, axis, start - rank * local_length, start - first, end - start))
    return moves, shapes


def rounds(moves: list[Move], training_size: int) -> list[list[Move]]:
    """Moves between different members, in rounds that all members follow: first one layer of every
    pipeline stage, then the next layer of each."""
    numbers: dict[str, int] = {}
    counts: collections.Counter[int] = collections.Counter()
    by_layer: dict[int, list[Move]] = {}
    for move in moves:
        layer, stage = ".".join(move.name.split(".")[:3]), move.of // training_size
        if layer not in numbers:
            numbers[layer], counts[stage] = counts[stage], counts[stage] + 1
        if move.of != move.to:
            by_layer.setdefault(numbers[layer], []).append(move)
    return [by_layer[number] for number in sorted(by_layer)]


class Resharder:
    """Gives each rank its slice of the model for generation over ``size`` ranks. The constructor is
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
        local_tensors = {
            name: LocalTensor(
                tuple(parameter.shape),
                parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
            )
            for name, parameter in named_weights(model).items()
            if name not in self.skipped
        }
        members_tensors: list = [None] * len(self.members)
        dist.all_gather_object(members_tensors, local_tensors, group=self.model_group)
        moves, shapes = plan(members_tensors, training_size, size, shape)
        self.shapes = {name: on[self.member] for name, on in shapes.items()}
        self.local_moves = [move for move in moves if move.of == move.to == self.member]
        own_rounds = [
            [move for move in moves_of_round if self.member in (move.of, move.to)]
            for moves_of_round in rounds(moves, training_size)
        ]
        self.rounds = [moves_of_round for moves_of_round in own_rounds if moves_of_round]
        self.extra_bytes = 0
        """Memory that the last ``weights()`` took in addition to the training weights: tensors that
        were received, and those that adapters were merged into."""

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, on the device of the training weights. Collective over the model-parallel
        group."""
        training_weights, weights = named_weights(self.model), {}
        for move in self.local_moves:
            slice_ = _slice(training_weights, move)
            if slice_.shape == self.shapes[move.name]:
                weights[move.name] = slice_
        example = next(iter(training_weights.values()))
        missing = {name: shape for name, shape in self.shapes.items() if name not in weights}
        for name, shape in missing.items():  # no rank sends the rows that pad the vocabulary
            create = torch.zeros if name in VOCABULARY else torch.empty
            weights[name] = create(shape, dtype=example.dtype, device=example.device)
        shared = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        self.extra_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in weights.values()
            if tensor.untyped_storage().data_ptr() not in shared
        )
        for move in self.local_moves:
            if move.name in missing:
                weights[move.name].narrow(move.dim, move.target, move.count).copy_(_slice(training_weights, move))
        for moves in self.rounds:
            self._exchange(moves, training_weights, weights)
        return weights

    def _exchange(self, moves: list[Move], training_weights, weights) -> None:
        """One round: one message for each pair of ranks, in the group of those that exchange
        anything: NCCL wants all of a group in its first call."""
        pairs: dict[tuple[int, int], list[Move]] = {}
        for move in moves:
            pairs.setdefault((move.of, move.to), []).append(move)
        operations, arriving = [], []
        for (of, to), moves_of_pair in pairs.items():
            if of == self.member:
                flat = torch.cat([_slice(training_weights, move).reshape(-1) for move in moves_of_pair])
                operations.append(dist.P2POp(dist.isend, flat, self.members[to], self.model_group))
            else:
                places = [weights[move.name].narrow(move.dim, move.target, move.count) for move in moves_of_pair]
                flat = places[0].new_empty(sum(place.numel() for place in places))
                operations.append(dist.P2POp(dist.irecv, flat, self.members[of], self.model_group))
                arriving.append((flat, places))
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        for flat, places in arriving:
            for place, values in zip(places, flat.split([place.numel() for place in places]), strict=True):
                place.copy_(values.view(place.shape))


def _slice(training_weights: dict[str, torch.nn.Parameter], move: Move) -> torch.Tensor:
    return training_weights[move.name].detach().narrow(move.dim, move.source, move.count)


def generation_group(members: list[int], size: int):
    """Process group of this rank's ``size`` generation ranks, which are neighbours in the
    model-parallel group; None for size 1. Collective. Raises ConfigError where ``size`` does not
    divide the members."""
    if len(members) % size:
        raise ConfigError(
            f"generation_tensor_parallel = {size} does not divide the {len(members)} ranks of tensor_parallel x "
            "pipeline_parallel; set it to 0 (as in training) or to a divisor"
        )
    if size == 1:
        return None
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, members)
    own_group = None
    for ranks in dict.fromkeys(
        tuple(group[first : first + size]) for group in everyone for first in range(0, len(group), size)
    ):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own_group = group
    return own_group
