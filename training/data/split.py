"""Which prompts are held out and which rows repeat another: preparation must know both before it
writes a row.

Both classes take row by row and keep no row. Ten million rows cost what ten thousand do, except for
one byte a row.
"""

from __future__ import annotations

import hashlib
import heapq
from pathlib import Path

import numpy as np

from training.config.data import DataConfig

BUCKETS = 64
"""Files over which digests are spread; one at a time is sorted in memory (24 bytes a digest)."""
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8")])
AT_ONCE = 1 << 16
"""Digests that collect in memory before they are written to their buckets."""


def same_prompt(prompt: str) -> str:
    """Key of a prompt: prompts that differ in case and spacing only are the same."""
    return " ".join(prompt.lower().split())


class HeldOut:
    """Chooses the prompts of a stage that no stage trains on: the share ``data.heldout`` of the
    distinct ones, at least 1 (of two or more) and at most ``heldout_max``.

    They are the first in an order that a hash of seed and text gives, so a prompt's place does not
    depend on other rows. Only the first ``heldout_max`` places stay in memory, and distinct prompts
    are counted only as far as their number matters.
    """

    def __init__(self, data: DataConfig):
        self.data, self.most = data, max(1, data.heldout_max)
        self.enough = int((self.most + 1) / data.heldout) + 1
        self._distinct: set[bytes] = set()
        self._first: list[int] = []
        """Heap of the negated places of the first prompts; the last of them is on top."""
        self._among: set[int] = set()

    def place(self, prompt: str) -> int:
        """Place of the prompt in the order: a number of 256 bits."""
        return int.from_bytes(hashlib.sha256(f"{self.data.seed}\0{same_prompt(prompt)}".encode()).digest(), "big")

    def add(self, place: int) -> None:
        """Add the next prompt by its place."""
        if len(self._distinct) < self.enough:
            self._distinct.add(place.to_bytes(32, "big"))
        if place in self._among or (len(self._first) == self.most and place > -self._first[0]):
            return
        self._among.add(place)
        if len(self._first) < self.most:
            heapq.heappush(self._first, -place)
        else:
            self._among.remove(-heapq.heappushpop(self._first, -place))

    @property
    def distinct(self) -> int:
        """Number of distinct prompts, counted only as far as it changes the choice."""
        return len(self._distinct)

    def chosen(self) -> set[int]:
        """Places of the held-out prompts; empty for a single prompt, which is needed for
        training."""
        if self.distinct < 2:
            return set()
        number = min(max(1, round(self.data.heldout * self.distinct)), self.most)
        return set(sorted(self._among)[:number])


class Repeats:
    """Finds rows of a stage that repeat an earlier one. Rows are compared by 128 bits of a hash,
    and the digests are on the disk."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = [folder / f"{bucket:02d}" for bucket in range(BUCKETS)]
        self.rows = 0
        self._digests: list[bytes] = []

    def add(self, text: str) -> None:
        """Add the next row."""
        self._digests.append(hashlib.blake2b(text.encode(), digest_size=16).digest())
        if len(self._digests) == AT_ONCE:
            self._spill()

    def flags(self) -> np.ndarray:
        """(rows,) bool: True where an equal row came earlier."""
        self._spill()
        repeated = np.zeros(self.rows, bool)
        for path in self.paths:
            if path.exists():
                records = np.fromfile(path, RECORD)
                records = records[np.lexsort((records["row"], records["low"], records["high"]))]
                again = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
                repeated[records["row"][1:][again]] = True
                path.unlink()
        return repeated

    def _spill(self) -> None:
        records = np.empty(len(self._digests), RECORD)
        halves = np.frombuffer(b"".join(self._digests), "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["row"] = np.arange(self.rows, self.rows + len(records))
        bucket = records["high"] % BUCKETS
        for number in np.unique(bucket).tolist():
            with open(self.paths[number], "ab") as file:
                records[bucket == number].tofile(file)
        self.rows += len(records)
        self._digests.clear()
