"""A seeded permutation of 0..n-1 that is computed on access, without a list of n numbers.

A balanced Feistel network (Luby and Rackoff 1988) permutes the numbers of 2b bits; one that falls
outside 0..n-1 is permuted again until it does not ("cycle walking", Black and Rogaway 2002), fewer
than four times on average. It is our own, so that no new version of a library changes the order of
a resumed run.
"""

from __future__ import annotations

import hashlib

import numpy as np

from training.errors import InvariantError

ROUNDS = 8
SMALLEST_BITS = 4
"""Of half a number: with fewer, so few round functions exist that some orders of a handful of rows
never come."""


class Permutation:
    """``Permutation(n, name)[indices]``: where each of ``indices`` (int64, 0..n-1) goes; ``name``
    tells one permutation from another."""

    def __init__(self, n: int, name: str):
        self.n, self.bits = n, max(SMALLEST_BITS, ((n - 1).bit_length() + 1) // 2)
        self.mask = np.uint64((1 << self.bits) - 1)
        self.keys = np.frombuffer(hashlib.sha512(name.encode()).digest(), dtype="<u8")
        if len(self.keys) != ROUNDS:
            raise InvariantError(f"{len(self.keys)} keys for {ROUNDS} rounds")

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        values = self._feistel(indices.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._feistel(values[outside])
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        half = np.uint64(self.bits)
        left, right = values >> half, values & self.mask
        for key in self.keys:
            left, right = right, left ^ (_mixed(right + key) & self.mask)
        return (left << half) | right


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every bit of the result depends on every bit of
    the value; wraps around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
