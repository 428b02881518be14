"""What the reward model says of itself on held-out pairs."""

import json
import math

import pytest
import torch

from tests.distributed import run
from training import reward


def test_calibration_equals_a_loop_over_pairs():
    margins = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    found = reward.calibration(reward.calibration_sums(margins[:200]) + reward.calibration_sums(margins[200:]))  # as two ranks add up
    bins = {edge: [] for edge in reward.CONFIDENCE}
    for margin in margins.tolist():
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins[max(edge for edge in bins if edge <= confidence)].append((margin > 0, confidence))
    error = sum(abs(sum(right - confidence for right, confidence in pairs)) for pairs in bins.values()) / len(margins)
    assert found["heldout_calibration_error"] == pytest.approx(error, abs=1e-4)
    for edge, pairs in bins.items():
        assert found[f"heldout_accuracy_at_{edge}"] == pytest.approx(sum(right for right, _ in pairs) / len(pairs))


def test_interval_of_a_proportion():
    """Wilson's own formula at 8 of 10 (e.g. Brown, Cai and DasGupta 2001): 0.490 to 0.943."""
    assert reward.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_heldout_numbers_are_the_same_on_two_data_parallel_ranks(small_run, tmp_path):
    for data in (1, 2):
        run(reward.run, 1, 1, data, small_run.reward(tmp_path / str(data), iterations=2, eval_every=2))
    one, two = ([json.loads(line) for line in (tmp_path / str(data) / "metrics.jsonl").read_text().splitlines()][-1] for data in (1, 2))
    names = [name for name in one if name.startswith("heldout_") or name == "shorter_wins"]
    assert "heldout_calibration_error" in names and "heldout_accuracy_at_0.5" in names
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)
