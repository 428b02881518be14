"""From comparisons to win rates: a position swap that disagrees is a tie, and length is controlled
for. Pure.

A comparison's outcome is 1 where both orders prefer the model, 0 where both prefer the baseline,
else 1/2; one with an order without a verdict counts for nothing. Units of the bootstrap are
questions.

The length-controlled win rate follows AlpacaEval 2 (Dubois et al. 2024, "Length-Controlled
AlpacaEval"): a logistic regression of the outcome on the difference of length, read off at a
difference of zero,

    P(win) = sigmoid(theta + phi * tanh(d / sd(d)))

with d = characters of the model's answer less those of the baseline's.

Theirs has a third term, the difficulty of each instruction, estimated once from many models'
annotations of AlpacaEval's own instructions, and draws the fit to that of two baselines whose
length was tampered with. For one pair of models on other questions neither is there, so both are
left out; phi has a weak ridge penalty (C = 100, as theirs).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from eval.scores import bootstrap
from eval.scores.ratings import COVERAGE, NAMED

C = 100.0
"""Inverse strength of the penalty on phi, as scikit-learn counts it."""
ALIKE = 0.1
"""Most |tanh(d / sd(d))| of two answers of nearly equal length."""
SURE = 0.01
"""Distance from 0 or 1 below which only the penalty holds theta: near equal length nothing speaks
against it."""
_STEPS = 60
ERROR = "error"


def outcome(row: Mapping) -> float | None:
    """Of a pairwise row, from model_1's side: 1 win, 0 loss, 1/2 tie or disagreement; None where an
    order has no verdict."""
    first, second = row["g1_winner"], row["g2_winner"]
    if ERROR in (first, second):
        return None
    if first != second or first == "tie":
        return 0.5
    return 1.0 if first == "model_1" else 0.0


def table(pairs: Sequence[Mapping], lengths: Mapping[tuple, int] | None, questions: Sequence[int], seed: int) -> dict:
    """model_1 -> its summary against model_2. ``lengths``: (model, question_id, turn) -> characters
    of the answer, None where no one knows: then nothing is said about equal length. ``questions``:
    all ids."""
    models = list(dict.fromkeys(row["model_1"] for row in pairs))
    return {
        name: _summary([row for row in pairs if row["model_1"] == name], lengths, questions, seed) for name in models
    }


def _summary(
    pairs: Sequence[Mapping], lengths: Mapping[tuple, int] | None, questions: Sequence[int], seed: int
) -> dict:
    valid = [(row, result) for row in pairs if (result := outcome(row)) is not None]
    absent = [
        {
            "question_id": row["question_id"],
            "turn": row["turn"],
            "reason": row.get("reason", "unparsed"),
            "refusal": row.get("refusal", ""),
        }
        for row in pairs
        if outcome(row) is None
    ]
    counts = Counter(result for _, result in valid)
    both = sum(row["g1_winner"] != row["g2_winner"] for row, _ in valid)
    first = [row["g1_winner"] == "model_1" for row, _ in valid if row["g1_winner"] != "tie"]
    first += [row["g2_winner"] == "model_2" for row, _ in valid if row["g2_winner"] != "tie"]
    intervals = {
        "baseline": pairs[0]["model_2"],
        "wins": counts[1.0],
        "ties": counts[0.5],
        "losses": counts[0.0],
        "n_valid": len(valid),
        "n_expected": 2 * len(questions),
        "covered": len(valid) >= COVERAGE * 2 * len(questions),
        "absent": absent[:NAMED],
        "orders_disagree": both,
        "first_preferred": sum(first) / len(first) if first else None,
    }
    if not intervals["covered"]:
        return intervals
    place = {question: number for number, question in enumerate(questions)}
    units = np.array([place[row["question_id"]] for row, _ in valid])
    outcomes = np.array([result for _, result in valid])
    sums, n = (np.bincount(units, weights, minlength=len(questions)) for weights in (outcomes, np.ones(len(units))))
    intervals["win_rate"] = bootstrap.pooled_mean(sums, n, seed).as_dict()
    if lengths is None:
        return intervals
    longer = np.array(
        [
            lengths[row["model_1"], row["question_id"], row["turn"]]
            - lengths[row["model_2"], row["question_id"], row["turn"]]
            for row, _ in valid
        ],
        dtype=float,
    )
    controlled, low, high = length_controlled(outcomes, longer, units, len(questions), seed)
    return intervals | {
        "longer_by": float(longer.mean()),
        "length_controlled": {"mean": controlled, "low": low, "high": high, "units": len(questions)},
    }


def length_controlled(
    outcomes: np.ndarray, longer: np.ndarray, units: np.ndarray, questions: int, seed: int
) -> tuple[float, float, float]:
    """(win rate at equal length, its 95% interval); all arrays (n,): outcome 0..1, difference of
    lengths, number of the question.

    Where the regression is sure, no resample can doubt it: the interval is then that of Clopper &
    Pearson (1934) for the questions whose answers are nearly equally long, all won or all lost.
    Where all answers of one model are the longer ones it is 0 to 1: the rate is extrapolated.
    """
    spread = longer.std(ddof=1) if len(longer) > 1 else 0.0
    x = np.tanh(longer / spread) if spread else np.zeros_like(longer)
    draws = np.random.default_rng(seed).integers(0, questions, size=(bootstrap.RESAMPLES, questions))
    weights = np.stack([np.bincount(row, minlength=questions) for row in draws])[:, units]
    estimate = float(fit(outcomes, x, np.ones((1, len(x))))[0])
    low, high = map(float, np.nanpercentile(fit(outcomes, x, weights.astype(float)), [2.5, 97.5]))
    if (x > ALIKE).all() or (x < -ALIKE).all():
        return estimate, 0.0, 1.0
    alike = len(np.unique(units[np.abs(x) < ALIKE]))
    least = 0.025 ** (1 / alike) if alike else 0.0
    if estimate > 1 - SURE:
        low = min(low, least)
    if estimate < SURE:
        high = max(high, 1 - least)
    return estimate, low, high


def fit(outcomes: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) sigmoid(theta) of R weighted regressions by Newton's method; outcomes, x (n,), weights
    (R, n).

    Where all outcomes of one are 1 (or 0) theta is infinite, and the answer 1 (or 0); nan without
    any weight.
    """
    total = weights.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = weights @ outcomes / total
    inner = (mean > 0) & (mean < 1)
    w = weights[inner]
    a, b = np.zeros(len(w)), np.zeros(len(w))  # theta, phi
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        residual, curvature = w * (outcomes - p), w * p * (1 - p)
        gradient = residual.sum(1), residual @ x - b / C
        h11, h12, h22 = curvature.sum(1) + 1e-12, curvature @ x, curvature @ (x * x) + 1 / C
        determinant = h11 * h22 - h12 * h12
        step_a = (h22 * gradient[0] - h12 * gradient[1]) / determinant
        step_b = (h11 * gradient[1] - h12 * gradient[0]) / determinant
        # far from the solution a full step overshoots
        shrink = np.minimum(1, 2 / np.maximum(1e-12, np.hypot(step_a, step_b)))
        a, b = a + shrink * step_a, b + shrink * step_b
        if max(np.abs(step_a).max(initial=0), np.abs(step_b).max(initial=0)) < 1e-9:
            break
    result = mean.copy()
    result[inner] = 1 / (1 + np.exp(-a))
    return result
