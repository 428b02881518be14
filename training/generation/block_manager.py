"""Pages of the key-value cache: who holds which, how many hold it. Numbers only; the tensors are in
cache.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.errors import InvariantError


class Pages:
    """Page numbers 1..count with reference counts. Page 0 is nobody's: rows that only fill up a
    batch write there."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.unused = list(range(count, 0, -1))
        self.holders = [0] * (count + 1)

    def for_tokens(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int]:
        if count > len(self.unused):
            raise InvariantError(f"{count} pages wanted, {len(self.unused)} of {self.count} are unused")
        taken = [self.unused.pop() for _ in range(count)]
        for page in taken:
            self.holders[page] = 1
        return taken

    def share(self, pages: list[int]) -> list[int]:
        for page in pages:
            self.holders[page] += 1
        return list(pages)

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] < 0:
                raise InvariantError(f"page {page} was released more often than taken")
            if not self.holders[page]:
                self.unused.append(page)


@dataclass
class Prefix:
    """The whole pages of a prompt that several rows have; the first row fills them."""

    pages: list[int]
    filled: int = 0
    """Tokens whose keys and values are written, or will be by what is launched."""
    users: set[int] = field(default_factory=set)
    """Requests, by number, that hold it."""
