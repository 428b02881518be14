"""Learning rates against their closed forms, step by step."""

import math

import pytest
import torch

from training.config.trainers import Paths, SFTConfig
from training.optim.optimizer import make_schedule

FORMS = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
"""Share of the way from ``min_lr`` to ``lr`` when ``done`` (0..1) of the decay is."""


@pytest.mark.parametrize("schedule", FORMS)
@pytest.mark.parametrize(("steps", "warmup", "lowest"), [(20, 5, 0.0), (20, 0, 2e-4), (3, 2, 0.0)])
def test_rates_are_those_of_the_closed_form(schedule, steps, warmup, lowest):
    """Step k of n uses the rate after k ticks of n + 1: no step is at 0, where nothing is learned,
    neither the first nor the last."""
    config = SFTConfig(paths=Paths("", "", "", "", ""), schedule=schedule, lr=1e-3, min_lr=lowest, warmup_iterations=0)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    made = make_schedule(optimizer, config, 1e-3, steps, warmup)
    for k in range(1, steps + 1):
        made.step(1)
        decayed = lowest + (1e-3 - lowest) * FORMS[schedule]((k - warmup) / (steps + 1 - warmup))
        expected = 1e-3 * k / warmup if k <= warmup else decayed
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), k
        assert 0 < optimizer.param_groups[0]["lr"] <= 1e-3
