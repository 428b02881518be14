"""Several examples in one row, so that no step computes padding.

What is packed is one global batch: it holds the same examples with or without packing, hence the same loss, the same order of
the data and the same state to resume from; only the rows differ. (Packing a whole epoch ahead fills rows a little better, but
makes the number of examples in a step depend on their lengths, and with it the meaning of learning rate and batch size.)
"""

from __future__ import annotations

import heapq

import torch

from training.data.batches import Example


def pack(lengths: list[int], capacity: int, unit: int) -> list[list[int]]:
    """Indices of ``lengths`` in as few rows of at most ``capacity`` tokens as a multiple of ``unit`` allows, rows of about equal length.

    Longest first into the shortest row (LPT, Graham 1969), which keeps the longest row, to which all are padded, within 4/3 of the
    best. Rows may be empty where there are fewer examples than rows. Raises AssertionError for a length above ``capacity``.

    >>> pack([5, 4, 3, 3, 1], capacity=8, unit=2)
    [[0, 3], [1, 2, 4]]
    """
    assert max(lengths) <= capacity, f"an example of {max(lengths)} tokens in rows of {capacity}"
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    count = -(-max(1, -(-sum(lengths) // capacity)) // unit) * unit
    while True:
        rows = _spread(order, lengths, count)
        if max(sum(lengths[index] for index in row) for row in rows) <= capacity:
            return rows
        count += unit


def _spread(order: list[int], lengths: list[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    shortest = [(0, row) for row in range(count)]
    for index in order:
        length, row = shortest[0]
        rows[row].append(index)
        heapq.heapreplace(shortest, (length + lengths[index], row))
    return rows


def collate_packed(rows: list[list[Example]], pad_id: int, length: int) -> dict[str, torch.Tensor]:
    """``tokens`` (B, length) int64; ``documents`` (B, length) int64, the number of a token's example within its row, padding a document
    of its own; ``response_mask`` (B, length) bool, True at the replies' ids with their EOS."""
    tokens = torch.full((len(rows), length), pad_id)
    documents = torch.zeros(len(rows), length, dtype=torch.long)
    response_mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            end = start + len(example.tokens)
            assert end <= length, f"a row of at least {end} tokens in a batch of length {length}"
            tokens[row, start:end] = torch.tensor(example.tokens)
            documents[row, start:end] = number
            # The first token of a document is not predicted: what stands before it belongs to another.
            response_mask[row, start + max(example.response_start, 1):end] = True
            start = end
        documents[row, start:] = len(examples)
    return {"tokens": tokens, "documents": documents, "response_mask": response_mask}
