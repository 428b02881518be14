"""What a preference model is worth before anyone optimises against it: held-out accuracy against
what needs no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.files.foreign import fits, number
from eval.report.run_folder import metrics

_CONFIDENCE = re.compile(r"heldout_accuracy_at_([\d.]+)$")


def summary(stages: Mapping[str, str | Path]) -> dict[str, dict]:
    """Stage -> ``of_rows`` for each that measured accuracy on held-out comparisons: a reward model,
    or a policy's implicit reward."""
    accuracies = {name: of_rows(metrics(folder)) for name, folder in stages.items()}
    return {name: row for name, row in accuracies.items() if row}


def of_rows(rows: Sequence[Mapping]) -> dict | None:
    """The last evaluation: {"iteration", "accuracy", "low", "high", "margin", "floors": {name:
    accuracy}, "above": does the interval lie above every floor, "calibration": {confidence:
    accuracy}, "calibration_error"}; None where there is none."""
    row = next((row for row in reversed(rows) if fits(row.get("heldout_accuracy"), number)), None)
    if row is None:
        return None
    floors = {"chance": 0.5} | {
        name.removeprefix("heldout_").replace("_", " "): value
        for name, value in row.items()
        if name.endswith("_wins") and fits(value, number)
    }
    row = {name: value for name, value in row.items() if fits(value, number)}
    low = row.get("heldout_accuracy_low")
    bins = {match[1]: value for name, value in row.items() if (match := _CONFIDENCE.match(name))}
    return {
        "iteration": row.get("iteration"),
        "accuracy": row["heldout_accuracy"],
        "low": low,
        "high": row.get("heldout_accuracy_high"),
        "margin": row.get("heldout_margin"),
        "floors": floors,
        "above": None if low is None else low > max(floors.values()),
        "calibration": bins,
        "calibration_error": row.get("heldout_calibration_error"),
    }
