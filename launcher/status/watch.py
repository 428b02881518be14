"""A live view of runs until they have ended: on a terminal's other screen by rich.live,
else as plain lines."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from launcher.run.folder import Failed, Run
from launcher.slurm.polling import Queue
from launcher.status import row as stage_row
from launcher.status import state, table, terminal
from launcher.status.state import RunStatus, StageState
from training.errors import ConfigError

PLAIN_EVERY_S = 10
"""Seconds between plain lines of one running stage."""
POLL_EVERY_S, RUNS_PER_POLL = 1.0, 25
"""Seconds between reads of the files of so many runs. More runs wait proportionally longer: file
servers serve others, too. launcher/slurm/polling.py knows when Slurm is asked."""
DRAW_EVERY_S = 0.5
ERROR_S = 10
"""Seconds after which an error that stays ends ``watch``."""
LATE_S = 5
"""Seconds without an answer after which the screen says how old it is."""

Render = Callable[[int], list[str]]
"""From the terminal's columns to the lines to show."""


class Screen:
    """The terminal's other screen, by rich.live: the shell's own lines stay untouched below it.

    It draws without a thread: the process that waits may fork.
    """

    def __init__(self):
        # COLUMNS and LINES in the environment do not follow a terminal that changes its size
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.live = Live(
            console=Console(_environ=environment),
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.drawn = 0.0

    def __enter__(self) -> Screen:
        self.handlers = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number)),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, self._suspend),
        }
        self.live.start()
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.live.stop()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def draw(self, render: Render, force: bool = False) -> None:
        """Show the lines, at most each DRAW_EVERY_S unless ``force``."""
        if force or time.monotonic() > self.drawn + DRAW_EVERY_S:
            self.live.update(Frame(render), refresh=True)
            self.drawn = time.monotonic()

    def _suspend(self, _number: int, _frame) -> None:
        """Ctrl-Z: give the terminal back, and take it again when the shell lets us go on. rich
        leaves this signal alone."""
        self.live.stop()
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.live.start(refresh=True)


class Frame:
    """Lines for the terminal's size at the time of drawing."""

    def __init__(self, render: Render):
        self.render = render

    def __rich_console__(self, console: Console, _options) -> Iterator[Text]:
        columns, rows = console.size
        lines = self.render(terminal.columns_of(columns))
        if len(lines) > rows:
            lines = [*lines[: rows - 1], f"... {len(lines) - rows + 1} more lines; a higher window shows them"]
        for line in lines:
            text = Text.from_ansi(line)
            text.no_wrap, text.overflow = True, "crop"
            yield text


def poll_s(runs: list[Run]) -> float:
    """Seconds between reads of the files of so many runs."""
    return POLL_EVERY_S * max(1.0, len(runs) / RUNS_PER_POLL)


class StatusPoller(threading.Thread):
    """Reads the runs again and again in a thread of its own: a slow Slurm controller must not
    freeze the screen."""

    def __init__(self, runs: list[Run]):
        super().__init__(daemon=True)
        self.runs, self.queue = runs, Queue()
        self.statuses: list[RunStatus] = []
        self.read_at = time.monotonic()
        self.broken: list[str] | None = None if getattr(runs, "named", True) else []
        """Runs that can't be read, a line each; None where such a run is an error."""
        self.error: Exception | None = None
        """Why the last read failed; None where it did not."""
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            try:
                broken = None if self.broken is None else []
                self.statuses = state.statuses_of(self.runs, self.queue, broken)
                self.read_at, self.error, self.broken = time.monotonic(), None, broken
            except Exception as error:  # noqa: BLE001 - a half-written file; the main thread reports what stays so
                self.error = error
            self.stopped.wait(poll_s(self.runs))

    @property
    def goes_on(self) -> bool:
        """Whether nothing was read yet or a run is running."""
        nothing_read = not (self.statuses or self.broken)
        return nothing_read or any(status.overall == "running" for status in self.statuses)

    def raise_lasting_error(self) -> None:
        """Raise what keeps it from reading, once that has lasted for ERROR_S; at once where nothing
        was read before."""
        error = self.error
        if error is None or (self.statuses and time.monotonic() <= self.read_at + ERROR_S):
            return
        if isinstance(error, (OSError, ConfigError)):
            raise error
        folders = ", ".join(str(run.folder) for run in self.runs)
        raise Failed(f"{folders} can't be read: {type(error).__name__}: {error}") from error


def on_terminal() -> bool:
    """Whether the output is a terminal that can be redrawn."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def watch(runs: list[Run]) -> int:
    """Show the runs until no run goes on. Exit code: 0 all done, 1 some are not, 130 after Ctrl-C,
    which leaves them alone."""
    poller = StatusPoller(runs)
    poller.start()
    lines = None if on_terminal() else PlainLines(runs)
    try:
        with contextlib.nullcontext() if lines else Screen() as screen:
            while poller.goes_on:
                poller.raise_lasting_error()
                if lines:
                    lines.print_changes(poller.statuses)
                elif poller.statuses:
                    screen.draw(lambda columns: live_lines(poller, columns))
                time.sleep(0.1)
    except KeyboardInterrupt:
        _print_final(poller, lines)
        click.echo("not watching any longer; what runs goes on. stop it: python -m launcher cancel RUN")
        return 130
    _print_final(poller, lines)
    for line in poller.broken or []:
        terminal.say(line, err=True)
    return 0 if all(status.overall == "done" for status in poller.statuses) and not poller.broken else 1


def live_lines(poller: StatusPoller, columns: int) -> list[str]:
    """What ``watch`` shows: the screen of the only run, or a line a run; and how old it is where
    the answer is late."""
    age = time.monotonic() - poller.read_at
    late = f", as of {stage_row.format_age(age)} ago" if age > LATE_S + poll_s(poller.runs) else ""
    footer = f"{time.strftime('%H:%M:%S')}{late}  Ctrl-C leaves; the run goes on"
    return [*status_lines(poller.statuses, columns), "", click.style(footer[:columns], dim=True)]


def status_lines(statuses: list[RunStatus], columns: int) -> list[str]:
    """The screen of the only run, or a line a run."""
    now = time.time()
    if len(statuses) == 1:
        return table.run_lines(statuses[0], columns, now)
    return table.runs_lines(statuses, columns, now)


def _print_final(poller: StatusPoller, lines: PlainLines | None) -> None:
    """The last state stays on the terminal."""
    poller.stopped.set()
    if lines:
        lines.print_changes(poller.statuses)
    elif poller.statuses:
        click.echo("\n".join(status_lines(poller.statuses, terminal.width())))


class PlainLines:
    """A plain line for each change of a stage, and every PLAIN_EVERY_S for one that runs."""

    def __init__(self, runs: list[Run]):
        self.several = len(runs) > 1
        self.printed: dict[tuple[str, str], tuple] = {}
        """(run, stage) -> the state and iteration of its last line."""
        self.printed_at: dict[tuple[str, str], float] = {}

    def print_changes(self, statuses: list[RunStatus], only: list[str] | None = None) -> None:
        """``only``: no lines of other stages."""
        for status in statuses:
            for row in status.stages:
                if only is None or row.stage in only:
                    self._print_change(status.run, row)

    def _print_change(self, run: Run, row: StageState) -> None:
        key, current = (run.id, row.stage), (row.state, row.progress.iteration)
        before = self.printed.get(key, ("not submitted", None))
        changed = row.state != before[0]
        if not changed and (current == before or row.state != "running"):
            return
        if not changed and time.monotonic() < self.printed_at[key] + PLAIN_EVERY_S:
            return
        self.printed[key], self.printed_at[key] = current, time.monotonic()
        click.echo(plain_line(row, table.run_name(run) if self.several else "", with_previous=changed))


def plain_line(row: StageState, run_name: str, with_previous: bool) -> str:
    """A stage's state on one line; ``with_previous``: also why it was queued again."""
    now = time.time()
    cells = stage_row.row_cells(row, now)
    parts = [
        time.strftime("%H:%M:%S"),
        run_name,
        f"{row.stage:8}",
        f"{row.state_word:9}",
        cells["iteration"],
        cells["numbers"],
        cells["speed"],
        f"{cells['left']} left" if cells["left"] else "",
        stage_row.reason(row),
        stage_row.expected_start(row, now),
        stage_row.requeue_reason(row) if with_previous else "",
    ]
    return "  ".join(filter(None, parts))


class Watch:
    """The progress of some stages of runs; the process that waits for them calls ``tick`` again and
    again. It has no thread: that process may fork."""

    def __init__(self, runs: list[Run], stages: list[str], every_s: float):
        self.runs, self.stages, self.every_s, self.next = runs, stages, every_s, 0.0
        self.lines, self.queue = PlainLines(runs), Queue()
        self.screen: Screen | None = None
        self.statuses: list[RunStatus] = []

    @contextlib.contextmanager
    def shown(self) -> Iterator[Watch]:
        """Live on a terminal; the last state stays on it."""
        if not on_terminal():
            yield self
            return
        try:
            with Screen() as self.screen:
                yield self
        finally:
            self.screen = None
            self.statuses = state.statuses_of(self.runs, self.queue)
            click.echo("\n".join(status_lines(self.statuses, terminal.width())))

    def tick(self, force: bool = False) -> list[str]:
        """Read the runs again when it is time, and show them.

        Returns the selected stages' overall state in each run; [] where nothing was read.
        """
        due = force or time.monotonic() >= self.next
        if due:
            self.next = time.monotonic() + self.every_s
            self.statuses = state.statuses_of(self.runs, self.queue)
        if self.screen and self.statuses:
            self.screen.draw(lambda columns: status_lines(self.statuses, columns), force=due)
        elif due and not self.screen:
            self.lines.print_changes(self.statuses, self.stages)
        if not due:
            return []
        return [state.overall(row for row in status.stages if row.stage in self.stages) for status in self.statuses]
