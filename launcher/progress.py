"""How far a stage is, by its own files: the end of metrics.jsonl and the last checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from launcher.pipeline import Stage
from launcher.run import Run

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
    made = Progress(saved=run.iteration(stage.name))
    if made.saved is not None:
        made.saved_at = (run.stage(stage.name) / "latest").stat().st_mtime
    found = rows(run, stage.name)
    if not found:
        return made
    last = found[-1]
    made.iteration, made.total, made.logged, made.tokens_per_s = (last.get(name) for name in
                                                                  ("iteration", "total", "time", "tokens_per_second"))
    for name in stage.key_numbers:
        values = [row[name] for row in found if row.get(name) is not None]
        if values:
            made.numbers[name] = values[-1]
    first = next((row for row in found[-RECENT:] if row["time"] >= since), last)
    done, seconds = last["iteration"] - first["iteration"], last["time"] - first["time"]
    if done > 0 and seconds > 0:
        made.speed = done / seconds
        made.eta_s = (made.total - made.iteration) / made.speed
    return made


def rows(run: Run, stage: str) -> list[dict]:
    """The whole rows in the last TAIL_BYTES of metrics.jsonl; a row that a full disk or a crash tore is passed over."""
    try:
        with open(run.stage(stage) / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = []
    for line in lines[1 if start else 0:-1]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and {"iteration", "total", "time"} <= set(row):
            found.append(row)
    return found
