"""Whether an update is made: not where its loss or gradient is not finite or a spike. Every rank
decides alike."""

from __future__ import annotations

import math

from training.config.trainers import TrainerConfig

MEMORY = 0.98
"""Weight of the past in the running mean of gradient norms: about the last 50 updates."""
YOUNG = 20
"""Updates before a norm can be called a spike."""


class Guard:
    """Decides for one learner whether an update is made."""

    def __init__(self, trainer: TrainerConfig):
        self.trainer = trainer
        self.mean, self.seen, self.skipped = 0.0, 0, 0

    def admits(self, metrics: dict[str, float], grad_norm: float) -> bool:
        """Whether to make the update of which loss and gradient are given. Raises
        FloatingPointError when too many in a row were not."""
        limit = self.trainer.grad_spike * self.mean if self.trainer.grad_spike and self.seen >= YOUNG else math.inf
        if all(map(math.isfinite, metrics.values())) and math.isfinite(grad_norm) and grad_norm <= limit:
            self.mean = MEMORY * self.mean + (1 - MEMORY) * grad_norm if self.seen else grad_norm
            self.seen, self.skipped = self.seen + 1, 0
            return True
        self.skipped += 1
        if self.skipped > self.trainer.skip_updates:
            what = (
                f"gradient norm {grad_norm:.4g} is a spike (limit {limit:.4g})"
                if math.isfinite(grad_norm)
                else "not finite"
            )
            raise FloatingPointError(
                f"{what}: {metrics | {'grad_norm': grad_norm}}; {self.skipped} updates in a row "
                f"(skip_updates = {self.trainer.skip_updates})"
            )
        return False

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean, "seen": self.seen, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.seen, self.skipped = state["mean"], state["seen"], state["skipped"]
