"""How far a stage is, by its own files: the end of metrics.jsonl and the last checkpoint."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from launcher.config.stages import Stage
from launcher.run import records
from launcher.run.folder import Run
from training.files.safe_files import Unfit, parse, read_tail

TAIL_BYTES = 32_768
RECENT = 50
"""Rows over which the speed is taken."""


@dataclass
class Progress:
    iteration: int | None = None
    total: int | None = None
    logged: float | None = None
    """When the last iteration was logged, seconds since 1970."""
    speed: float | None = None
    """Iterations a second, of this attempt."""
    tokens_per_s: float | None = None
    eta_s: float | None = None
    numbers: dict = field(default_factory=dict)
    saved: int | None = None
    """Iteration of the last complete checkpoint."""
    saved_at: float | None = None


def read(run: Run, stage: Stage, since: float) -> Progress:
    """Progress of a stage; the speed counts rows from ``since`` on, the start of its attempt."""
    progress = Progress(saved=run.iteration(stage.name))
    if progress.saved is not None:
        progress.saved_at = (run.stage(stage.name) / "latest").stat().st_mtime
    logged_rows = rows(run, stage.name)
    if not logged_rows:
        return progress
    last = logged_rows[-1]
    progress.iteration, progress.logged = last["iteration"], last["time"]
    progress.total, progress.tokens_per_s = (
        last[name] if records.fits(last.get(name), kind) else None
        for name, kind in (("total", records.is_whole), ("tokens_per_second", records.number))
    )
    for name in stage.key_numbers:
        values = [row[name] for row in logged_rows if isinstance(row.get(name), int | float)]
        if values:
            progress.numbers[name] = values[-1]
    first = next((row for row in logged_rows[-RECENT:] if row["time"] >= since), last)
    done, seconds = last["iteration"] - first["iteration"], last["time"] - first["time"]
    if done > 0 and seconds > 0 and progress.total is not None:
        progress.speed = done / seconds
        progress.eta_s = (progress.total - progress.iteration) / progress.speed
    return progress


def rows(run: Run, stage: str, most: int = TAIL_BYTES) -> list[dict]:
    """The whole rows in the last ``most`` bytes of metrics.jsonl, each with a number as its
    iteration and a time; one that a full disk or a crash tore, or that a trainer does not write, is
    passed over."""
    try:
        content, complete = read_tail(run.stage(stage) / "metrics.jsonl", most)
    except (FileNotFoundError, NotADirectoryError, Unfit):
        return []
    logged_rows = []
    for line in content.decode(errors="replace").split("\n")[0 if complete else 1 : -1]:
        with contextlib.suppress(Unfit):
            row = parse(line, stage)
            if isinstance(row, dict) and all(records.fits(row.get(name), kind) for name, kind in COLUMNS.items()):
                logged_rows.append(row)
    return logged_rows


COLUMNS = {"iteration": records.is_whole, "time": records.moment}
