"""A flat range of a tensor's elements as boxes, which torch's checkpoint format stores and cuts
again for any layout."""

from __future__ import annotations

import math

import torch
from megatron.core.dist_checkpointing import ShardedTensor


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start``..``stop`` of a tensor in row-major order as boxes (offset, size), in that
    order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # middle rows
    if first > last:  # inside one row
        return _in_row(shape, last, start, stop)
    middle = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if last > first else []
    return _in_row(shape, first - 1, start, first * row) + middle + _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int):
    row = math.prod(shape[1:])
    return [
        ((index, *offset), (1, *size)) for offset, size in boxes(shape[1:], start - index * row, stop - index * row)
    ]


def box(
    like: ShardedTensor, key: str, values: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]
) -> ShardedTensor:
    """``values`` as a box of the tensor that ``like`` is this rank's part of; the layer axis that
    it may lack is spelled out."""
    extra = like.prepend_axis_num
    place = (
        *like.global_offset[:extra],
        *(base + step for base, step in zip(like.global_offset[extra:], offset, strict=True)),
    )
    size = (1,) * extra + size
    # The last number of a replica is its data-parallel rank: there every box has one owner.
    return ShardedTensor(
        key,
        values.view(size),
        values.dtype,
        size,
        tuple(like.global_shape),
        place,
        axis_fragmentations=None,
        replica_id=(*like.replica_id[:-1], 0),
        allow_shape_mismatch=like.allow_shape_mismatch,
    )
