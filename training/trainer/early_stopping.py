"""Early stop: training ends when a held-out number no longer falls, and later stages use the
checkpoint where it was lowest."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from training.checkpoint import format
from training.files import atomic

CHOSEN = "chosen.json"
"""In the stage's folder: which checkpoint was chosen, written when the stage ends. The launcher
reads it (launcher/run/manifest.py)."""


@dataclass
class EarlyStop:
    """Counts evaluations without an improvement by more than ``min_delta``; after ``patience`` of
    them it is over."""

    patience: int
    min_delta: float
    name: str
    """The number that is watched; lower is better."""
    best: float = math.inf
    iteration: int = 0
    """Where ``best`` was found."""
    misses: int = 0

    def see(self, iteration: int, value: float) -> bool:
        """An evaluation's number; whether it is the best so far."""
        if value < self.best - self.min_delta:
            self.best, self.iteration, self.misses = value, iteration, 0
            return True
        self.misses += 1
        return False

    @property
    def over(self) -> bool:
        # nothing is chosen from numbers that were all NaN
        return self.misses >= self.patience and self.iteration > 0

    def state_dict(self) -> dict:
        return {"best": self.best, "iteration": self.iteration, "misses": self.misses}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.iteration, self.misses = state["best"], state["iteration"], state["misses"]


def choose(stage: str | Path, stop: EarlyStop, ended: int) -> str:
    """Note which checkpoint later stages use, durably, then make it ``latest`` -> what was chosen,
    in words. ``ended``: iterations that were run. On one rank only."""
    atomic.write_text(Path(stage) / CHOSEN, json.dumps({**asdict(stop), "ended": ended}, indent=1) + "\n")
    format.mark_latest(stage, stop.iteration)
    why = f"no better for {stop.misses} evaluations" if stop.over else "the last one"
    return f"ended at iteration {ended} ({why}); iteration {stop.iteration} is used: {stop.name} {stop.best:.6g}"


def chosen(stage: str | Path, stop: EarlyStop, iterations: int) -> dict | None:
    """What ``choose`` wrote, where it still holds: the same rule, ``latest`` not moved since, and
    no more ``iterations`` asked for than were run, unless patience ended them."""
    path = Path(stage) / CHOSEN
    if not path.is_file():
        return None
    said = json.loads(path.read_text(encoding="utf-8"))
    same = all(said[name] == getattr(stop, name) for name in ("patience", "min_delta", "name"))
    enough = said["misses"] >= said["patience"] or said["ended"] >= iterations
    return said if same and enough and said["iteration"] == format.latest(stage) else None


def forget(stage: str | Path) -> None:
    """Training goes on: what was chosen before does not hold. On one rank only."""
    path = Path(stage) / CHOSEN
    if path.exists():
        path.unlink()
        atomic.sync(path.parent)
