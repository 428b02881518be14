"""A view that lives: redrawn on the terminal's other screen until its runs have ended; plain lines
where the output is no terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import click

from launcher.run.folder import Failed, Run
from launcher.slurm.polling import Queue
from launcher.status import state, table, terminal
from launcher.status.state import RunStatus, StageState
from training.errors import ConfigError

PLAIN_EVERY_S = 10
"""Seconds between plain lines of one running stage."""
LOOK_EVERY_S, A_LOOK = 1.0, 25
"""Seconds between looks at the files of so many runs (more have proportionally longer: file servers
serve others, too); launcher/slurm/polling.py knows when Slurm is asked."""
WORST_S = 10
"""Seconds after which an error that stays ends ``watch``."""
LATE_S = 5
"""Seconds without an answer after which the picture says how old it is."""
OPEN, CLOSE = "\x1b[?1049h\x1b[?25l\x1b[?7l", "\x1b[?7h\x1b[?25h\x1b[?1049l"
"""The other screen, without cursor and without wrapping of long lines; and back."""


class Terminal:
    """The other screen of the terminal; the shell's own lines are untouched below it."""

    def __init__(self):
        self.size = os.terminal_size((0, 0))
        self.lines: list[str] = []

    def __enter__(self):
        self.handlers = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number)),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._pause),
        }
        self._write(OPEN)
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._write(CLOSE)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def resized(self) -> bool:
        return terminal.size() != self.size

    def draw(self, lines: Callable[[int], list[str]]) -> None:
        """Show ``lines(columns)``; what is below the last row is named, not shown."""
        self.size = terminal.size()
        self.lines = lines(terminal.columns_of(self.size.columns))
        shown, rows = self.lines, self.size.lines or terminal.UNKNOWN_ROWS
        if len(shown) > rows:
            shown = [*shown[: rows - 1], f"... {len(self.lines) - rows + 1} more lines; a higher window shows them"]
        self._write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in shown) + "\x1b[J")

    def _pause(self, number: int, _frame) -> None:
        """Ctrl-Z: give the terminal back, and take it again when the shell lets us go on."""
        self._write(CLOSE)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._write(OPEN)
        self.size = os.terminal_size((0, 0))

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def pause(runs: list[Run]) -> float:
    """Seconds between looks at the files of so many runs."""
    return LOOK_EVERY_S * max(1.0, len(runs) / A_LOOK)


class Looking(threading.Thread):
    """Looks at runs again and again beside the screen: a controller that takes its time must not
    freeze it."""

    def __init__(self, runs: list[Run]):
        super().__init__(daemon=True)
        self.runs, self.seen, self.at, self.queue = runs, [], time.monotonic(), Queue()
        self.broken: list[str] | None = None if getattr(runs, "named", True) else []
        self.error: Exception | None = None
        """Why the last look failed; None where it did not."""
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            try:
                broken = None if self.broken is None else []
                self.seen, self.at, self.error = (
                    state.statuses_of(self.runs, self.queue, broken),
                    time.monotonic(),
                    None,
                )
                self.broken = broken
            except Exception as error:  # noqa: BLE001 - a file half there; the main thread says what stays so
                self.error = error
            self.enough.wait(pause(self.runs))

    def check(self) -> None:
        """Raise what keeps it from looking, once that has lasted for WORST_S, or since the first
        look."""
        error = self.error
        if error and (not self.seen or time.monotonic() > self.at + WORST_S):
            if isinstance(error, (OSError, ConfigError)):
                raise error
            raise Failed(
                f"{', '.join(str(run.folder) for run in self.runs)} can't be read: {type(error).__name__}: {error}"
            ) from error


def watch(runs: list[Run]) -> int:
    """Show the runs until none goes on. Exit code: 0 all done, 1 some are not, 130 after Ctrl-C,
    which leaves them alone."""
    looking = Looking(runs)
    looking.start()
    shown = Lines(runs) if not sys.stdout.isatty() else None
    try:
        with Terminal() if shown is None else contextlib.nullcontext() as picture_of:
            drawn = 0.0
            while not (looking.seen or looking.broken) or any(seen.overall == "running" for seen in looking.seen):
                looking.check()
                if shown:
                    shown.tell(looking.seen)
                elif looking.seen and (time.monotonic() > drawn + 0.5 or picture_of.resized()):
                    picture_of.draw(lambda columns: picture(looking, columns))
                    drawn = time.monotonic()
                time.sleep(0.1)
    except KeyboardInterrupt:
        _leave(looking, shown)
        click.echo("not watching any longer; what runs goes on. stop it: python -m launcher cancel RUN")
        return 130
    _leave(looking, shown)
    for line in looking.broken or []:
        terminal.say(line, err=True)
    return 0 if all(seen.overall == "done" for seen in looking.seen) and not looking.broken else 1


def picture(looking: Looking, columns: int) -> list[str]:
    """What watch shows: the screen of the only run, or a line a run, and how old it is where the
    answer is late."""
    now, age = time.time(), time.monotonic() - looking.at
    late = f", as of {table.span(age)} ago" if age > LATE_S + pause(looking.runs) else ""
    footer = f"{time.strftime('%H:%M:%S')}{late}  Ctrl-C leaves; the run goes on"
    return [*many(looking.seen, columns, now), "", click.style(footer[:columns], dim=True)]


def many(seen: list[RunStatus], columns: int, now: float) -> list[str]:
    return table.run_lines(seen[0], columns, now) if len(seen) == 1 else table.runs_lines(seen, columns, now)


def _leave(looking: Looking, shown: Lines | None) -> None:
    """The last picture stays on the terminal."""
    looking.enough.set()
    if shown:
        shown.tell(looking.seen)
    elif looking.seen:
        click.echo("\n".join(many(looking.seen, terminal.width(), time.time())))


class Lines:
    """A plain line for each change of a stage, and every PLAIN_EVERY_S for one that runs."""

    def __init__(self, runs: list[Run]):
        self.several = len(runs) > 1
        self.said: dict[tuple[str, str], tuple] = {}
        self.at: dict[tuple[str, str], float] = {}

    def tell(self, seen: list[RunStatus], only: list[str] | None = None) -> None:
        for one in seen:
            for row in one.stages:
                if only is None or row.stage in only:
                    self._line(one.run, row)

    def _line(self, run: Run, row: StageState) -> None:
        key, now = (run.id, row.stage), (row.state, row.progress.iteration)
        before = self.said.get(key, ("not submitted", None))
        if now[0] == before[0] and (
            now == before or row.state != "running" or time.monotonic() < self.at[key] + PLAIN_EVERY_S
        ):
            return
        self.said[key], self.at[key] = now, time.monotonic()
        count = table.cells(row, 0, time.time())["iteration"]
        left = f"{table.clock(row.progress.eta_s)} left" if row.progress.eta_s is not None else ""
        why = f"{row.kind}: {row.why}" if row.kind else row.why
        name = table.plain(run.folder.name) if self.several else ""
        parts = [
            time.strftime("%H:%M:%S"),
            name,
            f"{row.stage:8}",
            f"{row.word:9}",
            count,
            table.numbers(row),
            table.speed(row.progress.speed),
            left,
            why,
            table.start(row, time.time()),
            table.previous(row) if row.state != before[0] else "",
        ]
        click.echo("  ".join(part for part in parts if part))


class Watch:
    """The progress of some stages of runs, to be ticked by whoever waits for them. Without a
    thread: the one who waits may fork."""

    def __init__(self, runs: list[Run], stages: list[str], every_s: float):
        self.runs, self.stages, self.every_s, self.next = runs, stages, every_s, 0.0
        self.lines, self.terminal, self.queue = Lines(runs), None, Queue()
        self.seen: list[RunStatus] = []

    @contextlib.contextmanager
    def shown(self) -> Iterator[Watch]:
        """Live on a terminal; the last picture stays."""
        if not sys.stdout.isatty():
            yield self
            return
        try:
            with Terminal() as self.terminal:
                yield self
        finally:
            self.terminal = None
            self.seen = state.statuses_of(self.runs, self.queue)
            click.echo("\n".join(many(self.seen, terminal.width(), time.time())))

    def tick(self, force: bool = False) -> list[str]:
        """Look again when it is time; the selection's overall state in each run, [] between
        looks."""
        if not force and time.monotonic() < self.next:
            if self.terminal and self.seen and self.terminal.resized():
                self.terminal.draw(self._picture)
            return []
        self.next = time.monotonic() + self.every_s
        self.seen = state.statuses_of(self.runs, self.queue)
        if self.terminal:
            self.terminal.draw(self._picture)
        else:
            self.lines.tell(self.seen, self.stages)
        return [state.overall(row for row in one.stages if row.stage in self.stages) for one in self.seen]

    def _picture(self, columns: int) -> list[str]:
        return many(self.seen, columns, time.time())
