"""Gold score and KL of the models' replies to held-out prompts, with intervals over prompts.
Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from eval.scores import bootstrap


def by_prompt(rows: Sequence[dict], field: str) -> dict[int, float]:
    """index -> mean of ``field`` over the prompt's samples; prompts whose field is null are left
    out."""
    values = defaultdict(list)
    for row in rows:
        if row[field] is not None:
            values[row["index"]].append(row[field])
    return {index: sum(scores) / len(scores) for index, scores in sorted(values.items())}


def summary(replies: dict[str, list[dict]], kls: dict[str, list[dict]], seed: int) -> dict:
    """{"prompts", "baseline", "gold": {model: Interval}, "gold_difference": {model: Interval},
    "kl": {model: Interval}}; the intervals are over prompts; gold is empty where no prompt has a
    rubric."""
    baseline = next(iter(replies))
    gold = {name: by_prompt(rows, "gold") for name, rows in replies.items()}
    base = gold[baseline]
    graded = {name: values for name, values in gold.items() if values}
    ones = [1] * len(base)
    differences = {
        name: bootstrap.paired_difference([values[i] for i in base], ones, list(base.values()), ones, seed).as_dict()
        for name, values in graded.items()
        if name != baseline
    }
    return {
        "prompts": len({row["index"] for row in replies[baseline]}),
        "baseline": baseline,
        "gold": {name: bootstrap.mean(list(values.values()), seed).as_dict() for name, values in graded.items()},
        "gold_difference": differences,
        "kl": {
            name: bootstrap.mean(list(by_prompt(rows, "kl").values()), seed).as_dict()
            for name, rows in kls.items()
            if rows
        },
    }
