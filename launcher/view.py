"""What a person sees: the plan, the status table, progress with time left. Plain lines where the output is no terminal."""

from __future__ import annotations

import contextlib
import time

from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from launcher import state
from launcher.logs import attempts
from launcher.run import Run

COLOURS = {"done": "green", "running": "cyan", "pending": "yellow", "requeued": "yellow", **dict.fromkeys(state.BAD, "red")}
PLAIN_EVERY_S = 10
"""Seconds between plain lines of one running stage."""


def console() -> Console:
    """Wide enough for one line a stage when the output is a file or a pipe."""
    made = Console(highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = max(made.width, 200)
    return made


def plan_table(made) -> Table:
    """The graph, with what each selected stage asks for at most."""
    table = Table("stage", "after", "runs", "nodes x ranks", "GPUs", "limit", "GPU-hours at most",
                  title=str(made.run.folder), title_justify="left")
    total = 0.0
    for stage in made.stages:
        asked = made.resources(stage)
        gpus = asked.nodes * asked.gpus_per_node
        total += gpus * asked.minutes / 60
        table.add_row(stage.name, ", ".join(stage.parents) or "-", stage.module, f"{asked.nodes} x {asked.ranks_per_node}", str(gpus),
                      f"{asked.minutes} min", f"{gpus * asked.minutes / 60:.1f}")
    table.caption = f"{total:.1f} GPU-hours at most; profile {made.profile.name}: {made.reason}"
    return table


def states_table(run: Run, found: list[state.StageState], trouble: str) -> Group:
    """One row a stage: where it is, its numbers, and why it waits or how it ended."""
    table = Table("stage", "state", "iteration", "numbers", "left", "job", "try", "why",
                  title=f"{run.folder}  ({run.id})", title_justify="left")
    for row in found:
        table.add_row(row.stage, Text(row.state, COLOURS.get(row.state, "")), count(row), numbers(row),
                      duration(row.eta_s), str(row.job or ""), str(row.attempt or ""), Text(row.why))
    return Group(table, Text(f"Slurm can't be asked: {trouble}", "red")) if trouble else Group(table)


def count(row: state.StageState) -> str:
    return "" if row.iteration is None else f"{row.iteration}/{row.total}"


def numbers(row: state.StageState) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in row.numbers.items())


def duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Watch:
    """Progress of the stages of a run, to be ticked by whoever waits for them."""

    def __init__(self, run: Run, stages: list[str], out: Console, every_s: float):
        self.run, self.stages, self.out, self.every_s = run, stages, out, every_s
        self.next, self.said, self.said_at = 0.0, {}, {}
        # no thread of its own: the waiting process forks supervisors
        self.bars = Progress(TextColumn("{task.description:8}"), TextColumn("{task.fields[state]:9}"), BarColumn(30),
                             TextColumn("{task.fields[count]:>9}"), TextColumn("{task.fields[left]:>7}"),
                             TextColumn("{task.fields[numbers]}"), console=out, auto_refresh=False)
        self.tasks = {name: self.bars.add_task(name, total=1, state="", count="", left="", numbers="") for name in stages}

    @contextlib.contextmanager
    def shown(self):
        """Live bars on a terminal; the last picture stays."""
        if not self.out.is_terminal:
            yield self
            return
        with self.bars:
            yield self
            self.tick(force=True)

    def tick(self, force: bool = False) -> str:
        """Look again when it is time; returns the selection's overall state ("" between looks)."""
        if not force and time.monotonic() < self.next:
            return ""
        self.next = time.monotonic() + self.every_s
        found = [row for row in state.states(self.run)[0] if row.stage in self.stages]
        for row in found:
            if self.out.is_terminal:
                self._bar(row)
            else:
                self._line(row)
        if self.out.is_terminal:
            self.bars.refresh()
        return state.overall(found)

    def _bar(self, row: state.StageState) -> None:
        done, total = (1, 1) if row.state == "done" else (row.iteration or 0, row.total or 1)
        self.bars.update(self.tasks[row.stage], completed=done, total=total, state=row.state, count=count(row),
                         left=duration(row.eta_s), numbers=numbers(row) or row.why)

    def _line(self, row: state.StageState) -> None:
        before = self.said.get(row.stage, ("not submitted", None))
        now = (row.state, row.iteration)
        changed = now[0] != before[0]
        if not changed and (now == before or row.state != "running" or time.monotonic() < self.said_at[row.stage] + PLAIN_EVERY_S):
            return
        self.said[row.stage], self.said_at[row.stage] = now, time.monotonic()
        left = f"{duration(row.eta_s)} left" if row.eta_s is not None else ""
        parts = [time.strftime("%H:%M:%S"), f"{row.stage:8}", f"{row.state:9}", count(row), numbers(row), left, row.why]
        self.out.print("  ".join(part for part in parts if part), markup=False)


def failures(run: Run, stages: list[str]) -> list[str]:
    """For each stage that did not end well: its cause and where its log is."""
    said = []
    for row in state.states(run)[0]:
        if row.stage in stages and row.state in state.BAD:
            logs = attempts(run, row.stage)
            said.append(f"{row.stage} {row.state}: {row.why}\n  log: {logs[-1] if logs else run.stage(row.stage) / 'logs'}\n"
                        f"  then: python -m launcher resume {run.folder}")
    return said


def watch_status(run: Run, out: Console) -> None:
    """The status table, redrawn until every stage has ended or Ctrl-C."""
    from rich.live import Live

    with Live(console=out, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found, trouble = state.states(run)
            live.update(states_table(run, found, trouble), refresh=True)
            if all(row.state in state.FINAL or row.state == "not submitted" for row in found):
                return
            time.sleep(2)

