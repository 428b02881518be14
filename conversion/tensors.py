"""Tensors that stay on disk: where their pieces lie, and their rows without loading the rest.

Every format that we read (safetensors, .bin, torch_dist, Megatron-LM's .pt) becomes a ``Stored`` a
tensor: memory-mapped pieces whose pages the kernel may drop again. What is read at a time is a
block of rows; nothing as large as a tensor is ever allocated.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from training.errors import ConfigError
from training.models.lora import merge

# torch says once that it can't know such a buffer to be read-only: no one writes to ours
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)
BLOCK = 1 << 25
"""Bytes of a tensor that are read, converted and written at a time, a thread."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""Data types of weights that training can start from."""


class Piece(NamedTuple):
    """A block of a larger tensor: its first element's index in that tensor, and its values
    (memory-mapped)."""

    offset: tuple[int, ...]
    values: torch.Tensor


@dataclass(frozen=True)
class Rows:
    """A tensor (vector or matrix) of ``shape`` and ``dtype`` whose rows can be asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, length: int) -> torch.Tensor:
        """Values of some rows."""
        raise NotImplementedError

    def blocks(self, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """The rows in order, at most BLOCK bytes (or one row) at a time, contiguous, as
        ``dtype``."""
        step = max(1, BLOCK * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, self.shape[0], step):
            yield self.rows(start, min(step, self.shape[0] - start)).to(dtype or self.dtype).contiguous()

    def load(self) -> torch.Tensor:
        """All values, for small tensors."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True)
class Woven(Rows):
    """Several tensors as one: group by group the first part's rows of the group, then the second's,
    ..."""

    parts: tuple[Rows, ...]
    groups: int

    @classmethod
    def of(cls, parts: list[Rows], groups: int) -> Woven:
        dtypes = {part.dtype for part in parts}
        if len(dtypes) > 1:
            raise ConfigError(
                f"tensors that become one are of types {', '.join(map(str, dtypes))}; "
                "save the model in one type (model.to(torch.bfloat16).save_pretrained)"
            )
        return cls((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype, tuple(parts), groups)

    def rows(self, start: int, length: int) -> torch.Tensor:
        each = self.shape[0] // self.groups
        first, last = start // each, -(-(start + length) // each)
        parts = []
        for part in self.parts:
            count = part.shape[0] // self.groups
            parts.append(part.rows(first * count, (last - first) * count).unflatten(0, (last - first, count)))
        return torch.cat(parts, 1).flatten(0, 1)[start - first * each :][:length]


@dataclass(frozen=True)
class Unwoven(Rows):
    """One part of a tensor that was woven of several: of each of ``groups`` groups ``count`` rows,
    from ``first`` on."""

    whole: Rows
    groups: int
    first: int

    @classmethod
    def of(cls, whole: Rows, sizes: list[tuple[int, ...]], number: int, groups: int) -> Unwoven:
        """Part ``number`` of those of ``sizes``."""
        return cls(sizes[number], whole.dtype, whole, groups, sum(size[0] for size in sizes[:number]) // groups)

    def rows(self, start: int, length: int) -> torch.Tensor:
        each, count = self.whole.shape[0] // self.groups, self.shape[0] // self.groups
        first, last = start // count, -(-(start + length) // count)
        groups = self.whole.rows(first * each, (last - first) * each).unflatten(0, (last - first, each))
        return groups[:, self.first : self.first + count].flatten(0, 1)[start - first * count :][:length]


@dataclass(frozen=True)
class Stored(Rows):
    """A tensor (vector or matrix) of ``shape`` and ``dtype`` that lies in ``pieces``; what none
    covers is zero (``padded``)."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of_tensor(cls, values: torch.Tensor) -> Stored:
        return cls(tuple(values.shape), values.dtype, (Piece((0,) * values.dim(), values),))

    @classmethod
    def joined(cls, parts: list[Stored], axis: int) -> Stored:
        """Tensor-parallel shards side by side along ``axis``."""
        pieces, position = [], 0
        for part in parts:
            pieces += [Piece(_moved(piece.offset, axis, position), piece.values) for piece in part.pieces]
            position += part.shape[axis]
        shape = list(parts[0].shape)
        shape[axis] = position
        return cls(tuple(shape), parts[0].dtype, tuple(pieces))

    @property
    def complete(self) -> bool:
        """True where the pieces cover every element."""
        return sum(piece.values.numel() for piece in self.pieces) == math.prod(self.shape)

    def part(self, axis: int, start: int, length: int) -> Stored:
        """``length`` indices from ``start`` of ``axis``, as torch.narrow; no bytes are read."""
        parts = []
        for offset, values in self.pieces:
            first, last = max(start, offset[axis]), min(start + length, offset[axis] + values.shape[axis])
            if first < last:
                parts.append(
                    Piece(
                        _moved(offset, axis, max(offset[axis], start) - start - offset[axis]),
                        values.narrow(axis, first - offset[axis], last - first),
                    )
                )
        shape = list(self.shape)
        shape[axis] = length
        return Stored(tuple(shape), self.dtype, tuple(parts))

    def layer(self, index: int) -> Stored:
        """Row ``index`` of the first axis, without that axis."""
        row = self.part(0, index, 1)
        return Stored(row.shape[1:], row.dtype, tuple(Piece(piece.offset[1:], piece.values[0]) for piece in row.pieces))

    def padded(self, rows: int) -> Stored:
        """With zero rows below, up to ``rows``."""
        return dataclasses.replace(self, shape=(rows, *self.shape[1:]))

    def rows(self, start: int, length: int) -> torch.Tensor:
        """Values of some rows: a view of the file where one piece holds them, else a copy."""
        expected = self.part(0, start, length)
        if len(expected.pieces) == 1 and expected.complete:
            return expected.pieces[0].values
        values = torch.zeros(expected.shape, dtype=self.dtype)
        for offset, piece in expected.pieces:
            values[tuple(slice(first, first + size) for first, size in zip(offset, piece.shape, strict=True))] = piece
        return values


@dataclass(frozen=True)
class Merged(Stored):
    """W + scale B A: a matrix with its low-rank adapters (training/models/lora.py), added as its
    rows are read."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def part(self, axis: int, start: int, length: int) -> Merged:
        a, b = (self.a, self.b.narrow(0, start, length)) if axis == 0 else (self.a.narrow(1, start, length), self.b)
        weight = super().part(axis, start, length)
        return Merged(weight.shape, weight.dtype, weight.pieces, a, b, self.scale)

    def rows(self, start: int, length: int) -> torch.Tensor:
        return merge(super().rows(start, length), self.a, self.b.narrow(0, start, length), self.scale)


def _moved(offset: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    return (*offset[:axis], offset[axis] + by, *offset[axis + 1 :])


def equal(ours: Rows, theirs: Rows) -> bool:
    """Same shape, data type and bits."""
    return (
        ours.shape == theirs.shape
        and ours.dtype == theirs.dtype
        and all(torch.equal(raw(a), raw(b)) for a, b in zip(ours.blocks(), theirs.blocks(), strict=True))
    )


def raw(values: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: NaN equals itself, -0 is not 0."""
    return values.reshape(-1).view(torch.uint8)


def mapped(path: str | Path) -> mmap.mmap:
    """The file, memory-mapped, read-only: a writable private map counts as memory, which the kernel
    may refuse for large files."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ConfigError(f"{path} is truncated: it is empty")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # read ahead in large steps: half of the processor time from a cold disk
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    return mapping


def view(mapping: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    """A tensor whose storage is exactly its part of the file, at byte ``offset``."""
    if not (count := math.prod(shape)):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)
