"""The merged log of a run: the lines of all ranks, of srun and of the supervisor by time, each said
once for all ranks that said it.

A stage writes ``logs/attempt_N.log`` (lines ``2026-11-23T14:02:11.123 [rank] text``,
launcher/job/ranks.py); what the supervisor and Slurm say of its jobs stands in
``logs/supervise.log`` and ``logs/slurm-*.out``. All times are of the machines of the supervisors.
"""

from __future__ import annotations

import bisect
import heapq
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from launcher.run.folder import Run
from launcher.slurm.polling import Queue
from launcher.status import state
from launcher.status.log_groups import TOGETHER_S, Group, Groups, Line, collapsed, ranges
from launcher.status.terminal import plain
from training.errors import ConfigError
from training.files.safe_files import Unfit, open_regular, read_tail

STAMPED = re.compile(r"(\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?) (.*)", re.DOTALL)
TAGGED = re.compile(r"\[([\w.-]+)\] ?(.*)", re.DOTALL)
POLL_S, LOOK_S = 0.2, 5.0
TAIL_BYTES, MOST_TAIL_BYTES = 1 << 16, 1 << 24
"""Of the end of each log so much is read for the last lines at first, and at most."""
LONGEST, CHUNK = 1 << 20, 1 << 23
"""Most bytes of a line that are kept together, and of a log that are taken in at once."""
PROGRAM_TAGS = ("launcher", "srun", "slurm")
"""Who writes into a log and is no rank."""
ERROR = re.compile(
    r"error|exception|traceback|fatal|critical|\bkilled\b|out of memory|oom|segmentation fault|core dumped|abort|"
    r"NCCL WARN|CANCELLED AT|FAILURE|\bnan\b|assert|signal \d+|SIG[A-Z]{3,4}\b",
    re.IGNORECASE,
)
SETTING = re.compile(r"[A-Z][A-Z0-9_]*=\S* +# ")
"""A variable with its reason, as the supervisor prints them: TORCH_NCCL_ASYNC_ERROR_HANDLING is no
error."""


def attempts(run: Run, stage: str) -> list[Path]:
    """Logs of all attempts of a stage, in order."""
    return sorted((run.stage(stage) / "logs").glob("attempt_*.log"), key=_number)


def newest_stage(run: Run) -> str:
    """The stage whose log was written last; ConfigError when none has begun."""
    written = {
        name: paths[-1].stat().st_mtime for name in run.stages if (paths := attempts(run, name) or _others(run, name))
    }
    if not written:
        raise ConfigError(f"no stage of {run.folder} has written a log yet; status {run.folder} says what it waits for")
    return max(written, key=lambda name: written[name])


@dataclass
class Choice:
    """Which lines to show."""

    ranks: str = ""
    """"3", "0-7,12", "launcher", "srun,slurm"; "" all."""
    errors: bool = False
    traces: set = field(default_factory=set)
    """(stage, tag) of those in the middle of a traceback."""

    def __post_init__(self):
        self.tags = _tags(self.ranks) if self.ranks else None
        self.tags_read: set[str] = set()
        """Tags of all lines that were read, chosen or not."""

    def wants(self, line: Line) -> bool:
        self.tags_read.add(line.tag)
        if self.tags is not None and line.tag not in self.tags:
            return False
        return not self.errors or self._error(line)

    def check_ranks(self) -> None:
        """ConfigError where --rank names none of those that wrote what was read."""
        if self.tags is None or self.tags & self.tags_read:
            return
        numbers = [tag for tag in self.tags_read if tag.isdigit()]
        others = sorted(tag for tag in self.tags_read if tag in PROGRAM_TAGS)
        present = ", ".join([*([ranges(numbers)] if numbers else []), *others])
        raise ConfigError(f"--rank {self.ranks}: no line is of these; the log has lines of {present or 'no rank yet'}")

    def _error(self, line: Line) -> bool:
        """An error's line, or one of a traceback down to its exception."""
        who, text = (line.stage, line.tag), re.sub(r"^\[rank\d+\]: ?", "", line.text)
        if text.startswith("Traceback (most recent call last)"):
            self.traces.add(who)
        elif who in self.traces and text[:1] not in (" ", ""):
            self.traces.discard(who)
            return True
        return who in self.traces or bool(ERROR.search(text)) and not SETTING.match(text)


def show(run: Run, stage: str | None, attempt: str = "", choice: Choice | None = None, last: int = 0) -> Iterator[str]:
    """Lines to print of one stage, of the newest one (None) or of "all"; ``attempt``: "" the
    newest, a number, or "all"; ``last``: only so many from the end. ConfigError where there is none
    yet, no such attempt, or no line of the ranks of ``choice``."""
    names = list(run.stages) if stage == "all" else [stage or newest_stage(run)]
    if stage != "all":
        _check(run, names[0], attempt)
    choice = choice or Choice()
    groups = (
        _tail(run, names, attempt, choice, last)
        if last
        else collapsed(filter(choice.wants, _lines_of(run, names, attempt, Spans())))
    )
    yield from (text_of(group, stage == "all") for group in groups)
    choice.check_ranks()


def follow(run: Run, stage: str | None, choice: Choice | None = None, last: int = 0) -> Iterator[str]:
    """Lines of a stage's newest attempt and those still to come, until the stage has ended. Without
    a stage (or for "all"): of the newest one (of all), then of those that follow, until the run has
    ended."""
    several, choice, groups = stage in (None, "all"), choice or Choice(), Groups()
    begun = [name for name in run.stages if attempts(run, name) or _others(run, name)]
    names = [stage] if not several else begun if stage == "all" else [newest_stage(run)] if begun else []
    tails = Tails(run, list(run.stages) if several else [stage])
    spans = Spans(ends=tails.skip())
    old = (
        _tail(run, names, "", choice, last, spans)
        if last
        else collapsed(filter(choice.wants, _lines_of(run, names, "", spans)))
    )
    yield from (text_of(group, several) for group in old)
    for lines in tails.follow(None if several else stage):
        new_groups = [group for line in lines if choice.wants(line) for group in groups.add(line)]
        if not lines:
            new_groups += groups.rest()
        yield from (text_of(group, several) for group in new_groups)


@dataclass
class Spans:
    """Which bytes of each log are read: all, or from the end only so many that the last lines are
    among them."""

    ends: dict[Path, int] | None = None
    """Path -> where its reading ends; files that are not in it are not read. None: all files, to
    their ends."""
    window: int = 0
    """Bytes before the end; 0: all."""
    begun: dict[Path, str] = field(default_factory=dict)
    """Path -> stamp of the first line that was read, for those that were not read from their
    beginning."""

    def of(self, path: Path) -> tuple[int, int]:
        end = path.stat().st_size if self.ends is None else self.ends.get(path, 0)
        return (max(0, end - self.window) if self.window else 0), end


def _tail(
    run: Run, names: list[str], attempt: str, choice: Choice, last: int, spans: Spans | None = None
) -> list[Group]:
    """The last groups of these stages' lines, read from the ends of their files: what stands before
    costs nothing. Only a choice of ranks or errors that has too few lines near the end reads
    all."""
    ends, window = spans.ends if spans else None, TAIL_BYTES
    while True:
        near = Spans(ends, window)
        last_groups = deque(collapsed(filter(choice.wants, _lines_of(run, names, attempt, near))), maxlen=last)
        cut = max((_after(stamp) for stamp in near.begun.values()), default="")
        if not near.begun or len(last_groups) == last and all(group.line.stamp >= cut for group in last_groups):
            return list(last_groups)
        if window >= MOST_TAIL_BYTES:
            chosen = choice.errors or choice.tags is not None
            everything = collapsed(filter(choice.wants, _lines_of(run, names, attempt, Spans(ends))))
            return list(deque(everything, maxlen=last)) if chosen else list(last_groups)
        window *= 4


def _after(stamp: str) -> str:
    """The time from which on a group of identical lines holds no line from before ``stamp``."""
    try:
        return (datetime.fromisoformat(stamp) + timedelta(seconds=TOGETHER_S)).isoformat(timespec="milliseconds")
    except ValueError:
        return stamp


def _lines_of(run: Run, names: list[str], attempt: str, spans: Spans) -> Iterator[Line]:
    return heapq.merge(*(_stage_lines(run, name, attempt, spans) for name in names), key=lambda line: line.stamp)


def text_of(group: Group, several: bool) -> str:
    """``11-23 14:02:11 [0-499] text``; with ``several`` stages the stage stands before the
    ranks."""
    line = group.line
    when = f"{line.stamp[5:10]} {line.stamp[11:19]} " if line.stamp else ""
    return plain(f"{when}{f'{line.stage} ' if several else ''}[{ranges(group.tags)}] {line.text}")


class Tails:
    """New lines of the logs of some stages, files that begin later included."""

    def __init__(self, run: Run, stages: list[str]):
        self.run, self.stages = run, stages
        self.at: dict[Path, int] = {}
        self.stamp: dict[Path, str] = {}

    def skip(self) -> dict[Path, int]:
        """Pass over what stands there now, whole lines only; file -> where it goes on."""
        for _, path in self._files():
            with suppress(Unfit):
                size = path.stat().st_size
                end, complete = read_tail(path, LONGEST)
                self.at[path] = size if b"\n" not in end and not complete else size - len(end) + end.rfind(b"\n") + 1
        return dict(self.at)

    def follow(self, stage: str | None) -> Iterator[list[Line]]:
        """What is new, again and again, empty when nothing is; until ``stage`` (None: the run) has
        ended and all of it was read."""
        looked, size, ended, queue = 0.0, -1, False, Queue()
        while True:
            ledger = self.run.folder / "ledger.jsonl"
            now = ledger.stat().st_size if ledger.exists() else 0
            # ends stand in the ledger; of some only the queue knows
            if now != size or time.monotonic() > looked + LOOK_S:
                status = state.statuses_of([self.run], queue)[0]
                rows = [row for row in status.stages if stage in (None, row.stage)]
                ended, looked, size = not any(row.state in state.ACTIVE for row in rows), time.monotonic(), now
            lines = self.new(complete=not ended)
            yield lines
            if ended and not lines:
                return
            if not lines:
                time.sleep(POLL_S)

    def new(self, complete: bool = True) -> list[Line]:
        """Lines since the last call, by time; with ``whole`` a line still being written is left for
        the next."""
        new_lines = []
        for stage, path in self._files():
            try:
                with open(open_regular(path), "rb") as file:
                    file.seek(self.at.get(path, 0))
                    data = file.read(CHUNK)
            except Unfit:
                continue
            if complete and (b"\n" in data or len(data) < CHUNK):
                data = data[: data.rfind(b"\n") + 1]
            self.at[path] = self.at.get(path, 0) + len(data)
            for text in _split(data.decode(errors="replace")):
                line = parse(text, stage, _tag(path), self.stamp.get(path, ""))
                self.stamp[path] = line.stamp
                new_lines.append(line)
        return sorted(new_lines, key=lambda line: line.stamp)

    def _files(self) -> list[tuple[str, Path]]:
        return [
            (stage, path) for stage in self.stages for path in (*attempts(self.run, stage), *_others(self.run, stage))
        ]


def parse(text: str, stage: str, tag: str, before: str) -> Line:
    """One line of a file whose untagged lines are ``tag``'s and whose line before had the stamp
    ``before``."""
    stamped = STAMPED.match(text)
    stamp, text = (stamped[1].replace(" ", "T"), stamped[2]) if stamped else (before, text)
    tagged = TAGGED.match(text) if not tag else None
    if tagged:
        return Line(stamp, stage, tagged[1], tagged[2])
    return Line(stamp, stage, ("launcher" if stamped else "slurm") if tag else "?", text)


def _stage_lines(run: Run, stage: str, attempt: str, spans: Spans) -> Iterator[Line]:
    """Lines of the chosen attempts of a stage by time; the supervisor's lines belong to the attempt
    in whose time they were written."""
    paths = attempts(run, stage)
    begins = [_begin(run, stage, path) for path in paths]
    chosen = [path for path in paths if attempt in ("all", str(_number(path))) or (not attempt and path == paths[-1])]

    def among(line: Line) -> bool:
        if attempt == "all" or not paths:
            return True
        index = bisect.bisect_right(begins, line.stamp) - 1
        return paths[max(0, index)] in chosen

    others = (filter(among, _lines(path, stage, spans)) for path in _others(run, stage))
    return heapq.merge(*(_lines(path, stage, spans) for path in chosen), *others, key=lambda line: line.stamp)


def _begin(run: Run, stage: str, path: Path) -> str:
    """When an attempt began: the ledger says it, else its first line."""
    times = [
        event["time"]
        for event in run.ledger()
        if event["event"] == "started" and event.get("stage") == stage and event.get("attempt") == _number(path)
    ]
    if times:
        return datetime.fromtimestamp(times[-1]).isoformat(timespec="milliseconds")
    return next(_lines(path, stage, Spans()), Line("9", stage, "", "")).stamp


def _lines(path: Path, stage: str, spans: Spans) -> Iterator[Line]:
    stamp = ""
    try:
        start, end = spans.of(path)
        handle = open_regular(path)
    except (FileNotFoundError, Unfit):
        return
    with open(handle, "rb") as file:
        file.seek(start)
        if start:
            file.readline(LONGEST)  # the middle of a line
        while file.tell() < end and (text := file.readline(LONGEST)):
            line = parse(text.rstrip(b"\n").decode(errors="replace"), stage, _tag(path), stamp)
            stamp = line.stamp
            if start:
                spans.begun.setdefault(path, stamp)
            yield line
    if start:
        spans.begun.setdefault(path, "")


def _split(text: str) -> list[str]:
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def _others(run: Run, stage: str) -> list[Path]:
    """Where the supervisor of a stage and Slurm itself write."""
    folder = run.stage(stage) / "logs"
    return [*folder.glob("supervise.log"), *sorted(folder.glob("slurm-*.out"), key=_number)]


def _tag(path: Path) -> str:
    """ "" where each line says its rank itself."""
    return "" if path.name.startswith("attempt_") else "launcher"


def _number(path: Path) -> int:
    return int(re.sub(r"[^0-9]", "", path.stem)[:18] or 0)


def _tags(text: str) -> frozenset[str]:
    """The tags that ``--rank`` names."""
    tags: set[str] = set()
    for part in text.split(","):
        first, dash, end = part.strip().partition("-")
        if first.isdigit() and (end.isdigit() if dash else True):
            tags |= {str(number) for number in range(int(first), int(end or first) + 1)}
        elif part.strip() in PROGRAM_TAGS:
            tags.add(part.strip())
        else:
            raise ConfigError(
                f"--rank {text}: {part!r} is no rank; expected numbers, ranges "
                "such as 0-7, launcher, srun or slurm, with commas between"
            )
    return frozenset(tags)


def _check(run: Run, stage: str, attempt: str) -> None:
    """ConfigError where a stage has no log, or not of this attempt."""
    numbers = [_number(path) for path in attempts(run, stage)]
    if not numbers and not _others(run, stage):
        raise ConfigError(f"{stage} of {run.folder} has written no log yet; status {run.folder} says what it waits for")
    if attempt not in ("", "all") and (not attempt.isdigit() or int(attempt) not in numbers):
        raise ConfigError(
            f"--attempt {attempt}: {stage} of {run.folder} has attempts {', '.join(map(str, numbers))}; or all"
        )
