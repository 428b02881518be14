"""Pages of the key-value cache and their reference counts. Numbers only; the tensor is the
engine's."""

from __future__ import annotations

from dataclasses import dataclass, field

from training.errors import InvariantError


class Pages:
    """Page numbers 1..count with reference counts. No row owns page 0: rows that only fill up a
    batch write there."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.unused = list(range(count, 0, -1))
        self.holders = [0] * (count + 1)

    def for_tokens(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens."""
        return -(-tokens // self.size)

    def allocate(self, count: int) -> list[int]:
        """``count`` unused pages, each with one holder. Raises InvariantError where there are
        fewer."""
        if count > len(self.unused):
            raise InvariantError(f"{count} pages needed, {len(self.unused)} of {self.count} are unused")
        pages = [self.unused.pop() for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def fork(self, pages: list[int]) -> list[int]:
        """The same pages for one more holder."""
        for page in pages:
            self.holders[page] += 1
        return list(pages)

    def free(self, pages: list[int]) -> None:
        """Give up one hold on each page; a page without holders is unused again."""
        for page in pages:
            self.holders[page] -= 1
            if self.holders[page] < 0:
                raise InvariantError(f"page {page} was freed more often than allocated")
            if not self.holders[page]:
                self.unused.append(page)


@dataclass
class Prefix:
    """Full pages of a prompt that several rows share; the first row fills them."""

    pages: list[int]
    filled: int = 0
    """Tokens whose keys and values are written, or will be by what is launched."""
    users: set[int] = field(default_factory=set)
    """Requests, by number, that hold it."""
