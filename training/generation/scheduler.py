"""Scheduling of rows: admission, chunks of prefill, decode steps, preemption. Pure bookkeeping, no
tensors.

Rows are admitted while the cache is expected to hold them and the running rows until they end. A
row is expected to need its longest response until some rows have ended, and then the share that
those needed. Where the expectation was too low, the youngest row is preempted: it frees its pages
and is computed again later from its prompt and tokens. Nothing overflows, and the oldest row always
goes on.
"""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from training.errors import InvariantError
from training.generation.block_manager import Pages, Prefix
from training.generation.request import Request


class Row:
    """A request in progress. Its last token is never in the cache: the next decode step computes it
    and draws the following one."""

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        self.prompt = tuple(request.prompt)
        self.tokens: list[int] = []
        """Response tokens whose results have been read."""
        self.logprobs: list[float] = []
        self.reason = ""
        """Why it ended; empty while it goes on."""
        self.launched = 0
        """Response tokens of all launched steps; never behind ``tokens``."""
        self.cached = 0
        """Leading tokens whose keys and values are in the cache, once what is launched has run."""
        self.slot = -1
        self.pages: list[int] = []
        self.prefix: Prefix | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response, launched ones included."""
        return len(self.prompt) + self.launched

    @property
    def longest(self) -> int:
        return len(self.prompt) + self.request.sampling.max_new_tokens

    @property
    def ready(self) -> bool:
        """True if all but its last token are in the cache and the response may still grow."""
        return self.cached == self.length - 1 and self.length < self.longest

    def text(self, first: int, count: int) -> list[int]:
        """Tokens [first, first + count) of prompt and response."""
        return [*self.prompt, *self.tokens][first : first + count]


class PrefillChunk(NamedTuple):
    """Tokens [first, first + count) of a row, to be computed into the cache."""

    row: Row
    first: int
    count: int


class Scheduler:
    """``expected_fraction``: share of its longest response that a row is expected to need before
    any has ended."""

    def __init__(self, requests: Sequence[Request], pages: Pages, slots: int, expected_fraction: float = 1.0):
        self.pages, self.slots, self.expected_fraction = pages, list(range(slots - 1, -1, -1)), expected_fraction
        self.rows = [Row(number, request) for number, request in enumerate(requests)]
        self.running: list[Row] = []
        """In order of admission."""
        self.waiting: deque[Row] = deque()
        for row in self.rows:
            if row.request.sampling.max_new_tokens:
                self.waiting.append(row)
            else:
                row.reason = "length"
        self.repeated = {prompt for prompt, count in Counter(row.prompt for row in self.waiting).items() if count > 1}
        self.prefixes: dict[tuple[int, ...], Prefix] = {}
        self.ended_tokens = self.ended_longest = 0
        self.preemptions = 0
        self.full = False
        """A row was preempted and none has ended since: no row is admitted."""

    def admit(self, min_tokens: int = 0) -> list[Row]:
        """Admit waiting rows -> the rows that begin now. While others run, fewer than
        ``min_tokens`` prompt tokens wait for more, because small prefills are slow."""
        if not self.waiting or not self.slots or (self.full and self.running):
            return []
        chosen, tokens, longest_pages = [], 0, sum(map(self._longest_pages, self.running))
        future = sorted(map(self._future, self.running), reverse=True)
        shared = {prompt: len(prefix.pages) for prompt, prefix in self.prefixes.items()}
        unused = len(self.pages.unused)
        for row in self.waiting:
            unused -= self.pages.for_tokens(row.length) - (self._prefix_pages(row) if row.prompt in shared else 0)
            if row.prompt in self.repeated:
                shared.setdefault(row.prompt, self._prefix_pages(row))
            bisect.insort(future, self._future(row), key=lambda pair: (-pair[0], -pair[1]))
            longest_pages += self._longest_pages(row)
            is_only_row = not (self.running or chosen)
            full = unused < 0 or (
                min(self._peak(future), longest_pages) + sum(shared.values()) > self.pages.count and not is_only_row
            )
            if full or len(chosen) == len(self.slots):
                if self.running and tokens < min_tokens:
                    return []
                break
            chosen.append(row)
            tokens += row.length
        for row in chosen:
            self.waiting.popleft()
            self._begin(row)
        return chosen

    def _future(self, row: Row) -> tuple[int, int]:
        """(steps that the row is expected to go on, its tokens now without those in shared
        pages)."""
        fraction = (
            min(1.0, 1.1 * self.ended_tokens / self.ended_longest) if self.ended_longest else self.expected_fraction
        )
        shared = self._prefix_pages(row) * self.pages.size if row.prompt in self.repeated else 0
        return int(fraction * (row.longest - row.length)), row.length - shared

    def _longest_pages(self, row: Row) -> int:
        """Pages that the row alone holds at its longest."""
        return self.pages.for_tokens(row.longest) - (self._prefix_pages(row) if row.prompt in self.repeated else 0)

    def _peak(self, future: list[tuple[int, int]]) -> int:
        """Most pages that rows are expected to hold at once. Rows grow until they end, so the total
        peaks when one of them ends.

        ``future``: (steps left, tokens) of each row, those that go on longest first. When the k-th
        ends, k rows hold all their tokens and as many more as it had steps left (the "past-future"
        admission of LightLLM, Gong et al. 2025). A page a row is added: the last one is half empty
        on average, but not for all rows at once, and a preemption costs more than the rows that
        wait for half a page.
        """
        tokens = peak = 0
        for count, (left, length) in enumerate(future, 1):
            tokens += length
            peak = max(peak, (tokens + count * left) // self.pages.size + count)
        return peak

    def _prefix_pages(self, row: Row) -> int:
        """Full pages of the row's prompt without its last token, which every sample computes
        itself."""
        return (len(row.prompt) - 1) // self.pages.size

    def _begin(self, row: Row) -> None:
        row.slot = self.slots.pop()
        self.running.append(row)
        prefix_pages = self._prefix_pages(row)
        if row.prompt in self.repeated and prefix_pages:
            prefix = self.prefixes.get(row.prompt)
            if prefix is None:
                prefix = self.prefixes[row.prompt] = Prefix(self.pages.allocate(prefix_pages))
                row.pages = prefix.pages[:]
            else:
                row.pages = self.pages.fork(prefix.pages)
            prefix.users.add(row.number)
            row.prefix = prefix
        row.pages += self.pages.allocate(self.pages.for_tokens(row.length) - len(row.pages))

    def prefill(self, budget: int) -> list[PrefillChunk]:
        """The next tokens to compute into the cache, at most ``budget``, oldest rows first."""
        chunks: list[PrefillChunk] = []
        for row in self.running:
            if row.prefix is not None and row.cached < len(row.prefix.pages) * self.pages.size:
                prefix_tokens = len(row.prefix.pages) * self.pages.size
                if row.cached < row.prefix.filled == prefix_tokens:
                    row.cached = prefix_tokens
                elif row.cached < row.prefix.filled:
                    continue  # an older row is filling it
            count = min(row.length - 1 - row.cached, budget)
            if count <= 0:
                continue
            chunks.append(PrefillChunk(row, row.cached, count))
            row.cached += count
            budget -= count
            if row.prefix is not None:
                row.prefix.filled = max(row.prefix.filled, min(row.cached, len(row.prefix.pages) * self.pages.size))
        return chunks

    def ready(self) -> list[Row]:
        return [row for row in self.running if row.ready]

    def missing(self, rows: list[Row]) -> int:
        """Pages that a step of ``rows`` needs beyond the unused ones."""
        return sum(row.length > len(row.pages) * self.pages.size for row in rows) - len(self.pages.unused)

    def step(self, rows: list[Row]) -> list[Row]:
        """Account for a decode step of ``rows`` -> the rows that got a page."""
        grown = [row for row in rows if row.length > len(row.pages) * self.pages.size]
        for row in grown:
            row.pages += self.pages.allocate(1)
        for row in rows:
            row.cached, row.launched = row.cached + 1, row.launched + 1
        return grown

    def preempt(self) -> Row:
        """Move the youngest row back to the head of the queue. All its results must have been read.
        Raises InvariantError otherwise."""
        row = self.running[-1]
        if len(self.running) < 2 or row.launched != len(row.tokens):
            raise InvariantError(
                f"row {row.number} can't give way: {row.launched} of {len(row.tokens)} tokens are back, "
                f"{len(self.running)} rows run"
            )
        self._leave(row)
        row.cached = 0
        self.waiting.appendleft(row)
        self.preemptions, self.full = self.preemptions + 1, True
        return row

    def finish(self, row: Row, reason: str) -> None:
        """End a row and free its pages and slot."""
        row.reason, self.full = reason, False
        self._leave(row)
        self.ended_tokens += len(row.tokens)
        self.ended_longest += row.request.sampling.max_new_tokens

    def _leave(self, row: Row) -> None:
        self.running.remove(row)
        self.slots.append(row.slot)
        self.pages.free(row.pages)
        if row.prefix is not None:
            row.prefix.users.discard(row.number)
            if not row.prefix.users:
                del self.prefixes[row.prompt]
        row.pages, row.slot, row.prefix = [], -1, None
