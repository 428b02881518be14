"""Several examples in one row, so that no step computes padding.

What is packed is one global batch: it holds the same examples with or without packing, hence the
same loss, the same order of the data and the same state to resume from; only the rows differ.
(Packing a whole epoch ahead fills rows a little better, but makes the number of examples in a step
depend on their lengths, and with it the meaning of learning rate and batch size.)
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from typing import NamedTuple

import torch

from training.config.cost import MORE_ROWS, micro_batches
from training.data.batches import Example
from training.errors import InvariantError

EXCHANGES = 4
"""Most exchanges of examples between rows, for each row."""


class Layout(NamedTuple):
    """Layout of a global batch in rows."""

    rows: list[list[int]]
    """Examples' indices, row by row; the same number of rows for each data-parallel rank, in its
    order."""
    length: int
    """Tokens of every row, padding included."""
    micro_batch_size: int
    """Rows of each micro-batch."""


class RowLimits(NamedTuple):
    """Limits that the rows must keep."""

    capacity: int
    """Most tokens of a row's examples."""
    multiple: int
    """Rows' padded length is a multiple of this."""
    ranks: int
    """Data-parallel ranks: each has equally many rows."""
    micro_batch_size: int
    """Most rows of a micro-batch; a rank's rows are divided evenly."""
    pipeline: int = 1
    """Pipeline stages: with more, more and smaller micro-batches keep them busy."""
    group: int = 1
    """A rank's micro-batches are a multiple of this (the interleaved schedule takes them so)."""
    min_tokens: int = 0
    """A micro-batch of fewer tokens takes as long as one with this many
    (training.config.cost.launched_tokens)."""


def lay_out(lengths: list[int], limits: RowLimits) -> Layout:
    """Lay out examples of these ``lengths`` in the rows that take the least time. Number and length
    of the rows and the size of micro-batches are chosen together.

    training.config.cost.micro_batches estimates a rank's time. Among equal times (where all wait
    for the host) the layout with the least padding wins. For every number of rows the shortest
    multiple that holds the examples is tried. Rows may be empty where there are fewer examples than
    ranks. Raises InvariantError for a length above the capacity.

    >>> lay_out([5, 4, 3, 3, 1], RowLimits(capacity=8, multiple=1, ranks=1, micro_batch_size=2))
    Layout(rows=[[0, 3], [1, 2, 4]], length=8, micro_batch_size=2)
    """
    longest, total = max(lengths), sum(lengths)
    if longest > limits.capacity:
        raise InvariantError(f"an example of {longest} tokens in rows of {limits.capacity}")
    unit = limits.ranks * limits.group
    fewest = _up(max(1, -(-total // limits.capacity)), unit)
    highest = _up(limits.capacity, limits.multiple)
    ordered = sorted(lengths)
    best, min_tokens = None, (float("inf"), 0)
    for count in range(fewest, max(MORE_ROWS * fewest, _up(len(lengths), unit)) + 1, unit):
        if best and count > MORE_ROWS * fewest:
            break
        for length in range(_up(max(longest, -(-total // count)), limits.multiple), highest + 1, limits.multiple):
            seconds, size = micro_batches(
                count // limits.ranks, length, limits.micro_batch_size, limits.pipeline, limits.group, limits.min_tokens
            )
            if (seconds, count * length) >= min_tokens:
                break
            capacity = min(length, limits.capacity)
            if not _too_few(ordered, count, capacity) and (rows := spread(lengths, count, capacity)):
                best, min_tokens = Layout(rows, length, size), (seconds, count * length)
                break
    if not best:  # one example a row always fits
        raise InvariantError(f"{lengths} in {limits}")
    return best


def pack(lengths: list[int], capacity: int, unit: int) -> list[list[int]]:
    """Indices of ``lengths`` in as few rows of at most ``capacity`` tokens as a multiple of
    ``unit`` allows, rows of about equal length.

    Rows may be empty where there are fewer examples than rows. Raises InvariantError for a length
    above ``capacity``.

    >>> pack([5, 4, 3, 3, 1], capacity=8, unit=2)
    [[0, 3], [1, 2, 4]]
    """
    if max(lengths) > capacity:
        raise InvariantError(f"an example of {max(lengths)} tokens in rows of {capacity}")
    count = _up(max(1, -(-sum(lengths) // capacity)), unit)
    while not (rows := spread(lengths, count, capacity)):
        count += unit
    return rows


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _too_few(ordered: list[int], count: int, capacity: int) -> bool:
    """True if ``count`` rows surely can't hold the ``ordered`` lengths: at most k lengths above 1 /
    (k + 1) of a row fit one. Without this check a batch of 1,024 examples a little longer than half
    a row takes seconds."""
    return any(len(ordered) - bisect_right(ordered, capacity // (k + 1)) > k * count for k in (1, 2, 3, 4))


def spread(lengths: list[int], count: int, capacity: int) -> list[list[int]] | None:
    """Indices of ``lengths`` in ``count`` rows of at most ``capacity`` tokens, or None where no
    such rows are found.

    Examples go, longest first, into the shortest row (LPT, Graham 1969). While the longest row is
    too long, it gives an example to the shortest row that this helps, for a shorter one or for
    none, so that the two become most alike."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    shortest = [(0, row) for row in range(count)]
    for index in order:
        length, row = shortest[0]
        rows[row].append(index)
        filled[row] = length + lengths[index]
        heapq.heapreplace(shortest, (filled[row], row))
    for _ in range(EXCHANGES * count):
        longest = max(range(count), key=filled.__getitem__)
        if filled[longest] <= capacity:
            return rows
        if not _exchange(rows, filled, lengths, longest):
            return None
    return None


def _exchange(rows: list[list[int]], filled: list[int], lengths: list[int], longest: int) -> bool:
    """Make one exchange, in place, between the longest row and the shortest that it helps. Returns
    False where no exchange helps."""
    for other in sorted(range(len(rows)), key=filled.__getitem__):
        gap = filled[longest] - filled[other]
        moves = [
            (abs(gap - 2 * (lengths[one] - length)), one, two)
            for one in rows[longest]
            for two, length in [(None, 0), *((two, lengths[two]) for two in rows[other])]
            if 0 < lengths[one] - length < gap
        ]
        if moves:
            _, one, two = min(moves, key=lambda move: move[0])
            rows[longest].remove(one)
            rows[other].append(one)
            if two is not None:
                rows[other].remove(two)
                rows[longest].append(two)
            moved = lengths[one] - (0 if two is None else lengths[two])
            filled[longest] -= moved
            filled[other] += moved
            return True
    return False


def collate_packed(rows: list[list[Example]], pad_id: int, length: int) -> dict[str, torch.Tensor]:
    """``tokens`` (B, length) int64; ``documents`` (B, length) int64, the number of a token's
    example within its row, padding a document of its own; ``response_mask`` (B, length) bool, True
    at the ids that are learnt, the replies' with their ends. No token predicts a document's first:
    the one before it belongs to another document."""
    tokens = torch.full((len(rows), length), pad_id)
    documents = torch.zeros(len(rows), length, dtype=torch.long)
    response_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            end = start + len(example.tokens)
            if end > length:
                raise InvariantError(f"a row of at least {end} tokens in a batch of length {length}")
            tokens[row, start:end] = torch.tensor(example.tokens)
            documents[row, start:end] = number
            for first, last in example.spans:
                response_mask[row, start + first : start + last] = True
            start = end
        documents[row, start:] = len(examples)
    return {"tokens": tokens, "documents": documents, "response_mask": response_mask}
