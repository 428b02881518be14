"""Identical lines of several ranks as one: ``[0-499] loading the data``. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

TOGETHER_S = 1.0
"""Identical lines of several ranks within so many seconds become one."""
MOST_GROUPS = 20_000
"""Lines held back at most while others like them may come."""


class Line(NamedTuple):
    stamp: str
    """ISO 8601, local time; "" where a line has none and none stands before it."""
    stage: str
    tag: str
    """The rank, "srun", "launcher" (the supervisor) or "slurm"."""
    text: str


@dataclass
class Group:
    """One text, and the ranks that said it."""

    line: Line
    number: int
    tags: list[str]


class Groups:
    """Puts identical lines of several ranks together. Every line is told once, and each rank's
    lines keep their order."""

    def __init__(self):
        self.waiting: deque[Group] = deque()
        self.by_text: dict[tuple[str, str], Group] = {}
        self.last: dict[tuple[str, str], int] = {}
        self.count = 0

    def add(self, line: Line) -> Iterator[Group]:
        """Take a line; gives back those that wait for no other any more."""
        yield from self._until(line)
        who, what = (line.stage, line.tag), (line.stage, line.text)
        group = self.by_text.get(what)
        if (
            group is None
            or self.last.get(who, -1) >= group.number
            or not (line.tag.isdigit() and group.tags[0].isdigit())
        ):
            self.count += 1
            group = self.by_text[what] = Group(line, self.count, [])
            self.waiting.append(group)
        group.tags.append(line.tag)
        self.last[who] = group.number

    def rest(self) -> Iterator[Group]:
        while self.waiting:
            yield self._first()

    def _until(self, line: Line) -> Iterator[Group]:
        now = _seconds(line.stamp)
        while self.waiting and (
            len(self.waiting) > MOST_GROUPS or not 0 <= now - _seconds(self.waiting[0].line.stamp) < TOGETHER_S
        ):
            yield self._first()

    def _first(self) -> Group:
        group = self.waiting.popleft()
        what = (group.line.stage, group.line.text)
        if self.by_text.get(what) is group:
            del self.by_text[what]
        return group


def collapsed(lines: Iterable[Line]) -> Iterator[Group]:
    groups = Groups()
    for line in lines:
        yield from groups.add(line)
    yield from groups.rest()


def ranges(tags: list[str]) -> str:
    """``["0", "1", "2", "5"]`` -> ``0-2,5``."""
    if not all(tag.isdigit() for tag in tags):
        return ",".join(tags)
    parts: list[list[int]] = []
    for number in sorted(map(int, tags)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == end else f"{first}-{end}" for first, end in parts)


def _seconds(stamp: str) -> float:
    """Seconds of the day; a line of another day is far away."""
    if not stamp:
        return 0.0
    hours, minutes, seconds = stamp[11:].split(":")
    return int(stamp[8:10]) * 86_400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)
