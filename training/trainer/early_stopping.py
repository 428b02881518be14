"""Early stop: training ends when a held-out number no longer falls, and later stages use the
checkpoint where it was lowest."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass
class EarlyStop:
    """Counts evaluations without an improvement by more than ``min_delta``; after ``patience`` of
    them the stage ends."""

    patience: int
    min_delta: float
    name: str
    """The metric that is watched; lower is better."""
    best: float = math.inf
    iteration: int = 0
    """Iteration of ``best``; 0 before the first evaluation that is a number."""
    misses: int = 0
    """Evaluations since then."""

    def update(self, iteration: int, value: float) -> bool:
        """Count one evaluation. Returns True if it is the best so far."""
        if value < self.best - self.min_delta:
            self.best, self.iteration, self.misses = value, iteration, 0
            return True
        self.misses += 1
        return False

    @property
    def over(self) -> bool:
        """Whether patience has run out. Never where all evaluations were NaN: there is nothing to
        choose."""
        return self.misses >= self.patience and self.iteration > 0

    def record(self, ended: int) -> dict:
        """What the stage's folder keeps of the choice (JSON). ``ended``: iterations that were
        run."""
        return {**asdict(self), "ended": ended}

    def still_holds(self, record: dict, iterations: int) -> bool:
        """Whether an earlier attempt's ``record`` still ends the stage: the rule is the same, and
        its patience ran out or it ran at least ``iterations``."""
        same_rule = all(record[name] == getattr(self, name) for name in ("patience", "min_delta", "name"))
        return same_rule and (record["misses"] >= record["patience"] or record["ended"] >= iterations)

    def verdict(self, ended: int) -> str:
        """The choice as a line of the log."""
        why = f"no better for {self.misses} evaluations" if self.over else "the last one"
        return f"ended at iteration {ended} ({why}); iteration {self.iteration} is used: {self.name} {self.best:.6g}"

    def state_dict(self) -> dict:
        return {"best": self.best, "iteration": self.iteration, "misses": self.misses}

    def load_state_dict(self, state: dict) -> None:
        self.best, self.iteration, self.misses = state["best"], state["iteration"], state["misses"]
