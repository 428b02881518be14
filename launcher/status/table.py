"""What status and watch show, as lines of text of a given width: one screen a run, or one line a
run. The one place that lays out rows; launcher/status/row.py makes their texts.

No terminal and no clock is used here. rich.table can't replace ``aligned``: notes of full width
stand between its rows, and columns leave a narrow screen in a fixed order.
"""

from __future__ import annotations

import textwrap

import click

from launcher.run.folder import SUMMARY, Run
from launcher.status import row as stage_row
from launcher.status.row import COLOURS, format_age, row_cells
from launcher.status.state import BAD, LAST_LINES, RunStatus, StageState
from launcher.status.terminal import plain

WIDE = 120
"""Columns from which on the bar and the numbers have room in a stage's row."""
WIDE_ONLY = ("bar", "numbers")
DATA_LINES = 6
"""Most lines about the rows that are shown."""
DROP_ORDER = ("bar", "try", "tokens/s", "job", "saved")
"""Columns that go first where the screen is too narrow."""
RUN_COLUMNS = ("iteration", "speed", "left", "saved")
"""Columns of a stage that a run's one line has."""


def run_lines(status: RunStatus, width: int, now: float) -> list[str]:
    """The screen of one run, each line within ``width`` columns: a row a stage, and below it why it
    waits or how it ended."""
    config = status.run.config["run"]
    about = plain(f"id {config['id']}, profile {config['profile']}")
    lines = [click.style(plain(status.run.folder), bold=True) + f"  {run_state(status)}  {about}"]
    lines += banner(status, width)
    cells = [row_cells(row, now) for row in status.stages]
    if width < WIDE:
        cells = [{name: text for name, text in row.items() if name not in WIDE_ONLY} for row in cells]
    header, *rows = aligned(cells, width)
    lines.append(click.style(truncate(header, width), dim=True))
    for row, text in zip(status.stages, rows, strict=True):
        below = notes(status, row, width, now)
        if len(below) == 1 and len(click.unstyle(text)) + len(below[0].strip()) + 2 <= width:
            text, below = f"{text}  {below[0].strip()}", []
        lines += [truncate(text, width), *below]
    return [*lines, *data_lines(status, width)]


def runs_lines(statuses: list[RunStatus], width: int, now: float) -> list[str]:
    """One line a run: where it is, how fast, when it ends or why it does not."""
    table = []
    for status in statuses:
        row = most_relevant_stage(status)
        cells = row_cells(row, now)
        table.append(
            {
                "run": run_name(status.run),
                "state": click.style(run_state(status), COLOURS.get(row.state)),
                "stage": row.stage,
                **{name: cells[name] for name in RUN_COLUMNS},
                "": _run_note(status, row, now),
            }
        )
    lines = [truncate(line, width) for line in aligned(table, width)]
    lines[0] = click.style(lines[0], dim=True)
    return [*dict.fromkeys(line for status in statuses for line in queue_unreachable(status, width)), *lines]


def _run_note(status: RunStatus, row: StageState, now: float) -> str:
    """The end of a run's line."""
    if status.overall == "done":
        metrics = [f"{each.stage} {stage_row.metrics_text(each)}" for each in status.stages if each.progress.numbers]
        parts = [f"ended {format_age(now - row.ended)} ago" if row.ended else "", "  ".join(metrics)]
    else:
        metrics = [] if stage_row.reason(row) else [stage_row.metrics_text(row)]
        parts = [*metrics, *stage_row.situation(row, now)]
    return "; ".join(filter(None, parts))


def run_name(run: Run) -> str:
    """As a person types it: an element of a sweep with the sweep's name."""
    return plain(f"{run.folder.parent.name}/{run.folder.name}" if "sweep" in run.config["run"] else run.folder.name)


def notes(status: RunStatus, row: StageState, width: int, now: float) -> list[str]:
    """The lines under a stage's row."""
    nodes = f"on {row.nodes}" if row.nodes else ""
    texts = [
        stage_row.metrics_text(row) if width < WIDE and row.state != "not submitted" else "",
        "; ".join(filter(None, (stage_row.reason(row), stage_row.expected_start(row, now), nodes))),
        stage_row.requeue_reason(row),
    ]
    lines = [line for text in texts if text for line in wrap(text, width)]
    if row.state not in BAD:
        return lines
    lines += wrap(stage_row.advice_text(row), width) if row.advice else []
    if row.lines:
        rank = "" if row.rank is None else f" of rank {row.rank}"
        lines += wrap(f"last lines{rank}, more by: logs {plain(status.run.folder)} {row.stage} --errors", width)
        lines += [truncate(f"    | {text}", width) for text in row.lines[-LAST_LINES:]]
    return lines


def data_lines(status: RunStatus, width: int) -> list[str]:
    """What was dropped and cut of the rows that the run trains on."""
    texts, more = status.data[:DATA_LINES], len(status.data) - DATA_LINES
    if more > 0:
        texts = [*texts, f"{more} more such lines: {status.run.folder / 'data' / SUMMARY}"]
    return [line for text in texts for line in wrap(f"data: {plain(text)}", width, "")]


def queue_unreachable(status: RunStatus, width: int) -> list[str]:
    """That Slurm does not answer, with the last line of its error; [] where it does."""
    if not status.trouble:
        return []
    text = f"Slurm can't be asked: {status.trouble.splitlines()[-1]}; this is what the run's files say"
    return [click.style(line, "red") for line in wrap(text, width, "")]


def banner(status: RunStatus, width: int) -> list[str]:
    """The lines above the table: Slurm does not answer, the file STOP is there."""
    lines = queue_unreachable(status, width)
    if status.stop:
        text = "the file STOP is in the run folder: what runs saves and ends, nothing starts; resume removes it"
        lines += wrap(text, width, "")
    return lines


def run_state(status: RunStatus) -> str:
    """The run's state in a word; "idle" where stages are left and no process or job works on
    them."""
    return most_relevant_stage(status).state_word if status.overall == "failed" else status.overall


def most_relevant_stage(status: RunStatus) -> StageState:
    """The stage that tells where a run is: one that went wrong, else one that runs, else one that
    waits, else the last that is done."""
    for states in (("failed", "lost"), ("stopped",), ("cancelled",), ("running",), ("requeued",), ("pending",)):
        for row in status.stages:
            if row.state in states:
                return row
    done = [row for row in status.stages if row.state == "done"]
    return done[-1] if done else status.stages[0]


def aligned(table: list[dict[str, str]], width: int) -> list[str]:
    """Header and rows as lines. Empty columns are left out; those of DROP_ORDER go while the lines
    are too wide."""
    required = ("stage", "state", "")
    names = [name for name in (table[0] if table else ()) if name in required or any(row[name] for row in table)]
    sizes = {name: max(len(click.unstyle(text)) for text in (name, *(row[name] for row in table))) for name in names}
    for name in DROP_ORDER:
        if name in names and sum(sizes[each] + 2 for each in names if each) - 2 > width:
            names.remove(name)
    rows = [{name: name for name in names}, *table]
    padded = ([row[name] + " " * (sizes[name] - len(click.unstyle(row[name]))) for name in names] for row in rows)
    return ["  ".join(texts).rstrip() for texts in padded]


def wrap(text: str, width: int, indent: str = "    ") -> list[str]:
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines or [indent]


def truncate(text: str, width: int) -> str:
    """A line within ``width`` columns. One that is too long must end in text without a style."""
    excess = len(click.unstyle(text)) - width
    return text if excess <= 0 else text[: -excess - 1] + "…"
