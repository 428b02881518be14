"""The paged key-value cache, and the positions of a forward pass's tokens in it.

The cache is (layer, 2 for key and value, page, head, token of the page, head dimension): one head's
part of a page is contiguous.
"""

from __future__ import annotations

import torch


def token_bytes(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the bytes of the cache for one token on one rank."""
    return 2 * layers * kv_heads * head_dim * dtype.itemsize


class Batch:
    """Metadata of one forward pass over T new tokens of S sequences. Each sequence has some tokens,
    one after the other (prefill), or one (decode).

    ``table`` (S, P) int32 has each sequence's pages. ``lengths`` (S,) counts its tokens, the new
    ones included; none is above ``longest``. ``position`` (T,) is each new token's in its sequence.
    Its key goes to ``pages`` and ``offsets`` (T,).

    Prefill passes three more: ``counts``, the number of new tokens of each sequence; ``starts`` (S
    + 1,), the index of each sequence's first in the flat batch; ``owner`` (T,), each token's
    sequence.
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
        """What an attention backend has computed of this batch, once for all layers."""
