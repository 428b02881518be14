"""A sweep's runs side by side, a row a run, in the texts of launcher/status/row.py."""

from __future__ import annotations

import time
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from launcher.run.folder import elements, sweep_of
from launcher.status import row as stage_row
from launcher.status import state
from launcher.status.row import COLOURS
from launcher.status.state import RunStatus
from launcher.status.table import most_relevant_stage, run_state

STAGE_COLUMNS = ("stage", "iteration")
"""Columns of a run's most relevant stage."""


def comparison(folder: Path) -> list[dict]:
    """A dict a run: {"element", "folder", "values", "state", "stage", "iteration", "why",
    "numbers": {"sft.loss": 1.2, ...}}."""
    values = sweep_of(folder)["values"]
    rows = []
    for status in state.statuses_of(elements(folder)):
        stage, index = most_relevant_stage(status), int(status.run.folder.name)
        rows.append(
            {
                "element": index,
                "folder": str(status.run.folder),
                "values": values[index],
                "state": run_state(status),
                "stage": stage.stage,
                "iteration": stage.progress.iteration,
                "why": stage.why,
                "numbers": metrics_of(status),
            }
        )
    return rows


def metrics_of(status: RunStatus) -> dict[str, float]:
    """The metrics of all stages: {"sft.loss": 1.2, ...}."""
    return {f"{row.stage}.{name}": value for row in status.stages for name, value in row.progress.numbers.items()}


def sweep_table(folder: Path) -> Table:
    """A row a run, a column a swept key and a metric. Slurm is asked once."""
    sweep, now = sweep_of(folder), time.time()
    statuses = state.statuses_of(elements(folder))
    keys = list(sweep["values"][0])
    names = list(dict.fromkeys(name for status in statuses for name in metrics_of(status)))
    columns = ("run", *keys, "state", *STAGE_COLUMNS, *names, "why")
    table = Table(*columns, title=f"{folder}  ({sweep['id']})", title_justify="left")
    for status in statuses:
        stage, metrics = most_relevant_stage(status), metrics_of(status)
        values, cells = sweep["values"][int(status.run.folder.name)], stage_row.row_cells(stage, now)
        table.add_row(
            str(status.run.folder),
            *(str(values[key]) for key in keys),
            Text.from_ansi(click.style(run_state(status), COLOURS.get(stage.state))),
            *(cells[name] for name in STAGE_COLUMNS),
            *(stage_row.format_metric(metrics[name]) if name in metrics else "" for name in names),
            "; ".join(stage_row.situation(stage, now)),
        )
    return table
