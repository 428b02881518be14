"""The paged key-value cache, and where the tokens of a forward pass stand in it.

Keys and values stand as (layer, 2, page, head, token of the page, head dimension): what one head
reads of a page is one piece of memory.
"""

from __future__ import annotations

import torch


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the cache that one token takes on one rank."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize


class Batch:
    """Where the T new tokens of a forward pass stand: some of each of S sequences, one sequence
    after the other; one each in a decode step.

    ``table`` (S, P) int32 pages; ``lengths`` (S,) tokens of each sequence with its new ones, none
    over ``longest``; ``position`` (T,) of each new token in its sequence; ``pages``, ``offsets``
    (T,): where its keys go. Of prefill alone: ``counts``, new tokens of each sequence, ``starts``
    (S + 1,), the first of each in the flat batch, and ``owner`` (T,), each token's sequence.
    """

    def __init__(
        self,
        table,
        lengths,
        position,
        page: int,
        longest: int,
        starts=None,
        counts: list[int] | None = None,
        owner=None,
    ):
        self.table, self.lengths, self.position, self.starts = table, lengths, position, starts
        self.counts, self.longest, self.longest_query = counts, longest, max(counts) if counts else 1
        owner = torch.arange(len(position), device=position.device) if owner is None else owner
        self.pages = table[owner, position // page].long()
        self.offsets = position % page
        self.derived: dict = {}
        """What an attention backend made of this batch once for all layers."""
