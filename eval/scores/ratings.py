"""From judgments to the table: averages, intervals and differences, or no number at all. Pure.

Average = mean of all valid ratings (micro), as FastChat prints it; macro = mean of the category
means, None where a category has no valid rating. Units of the bootstrap are questions, with all
their turns and repeats. Below ``COVERAGE`` valid ratings a model gets no average: unparsed ratings
are not missing at random.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from eval.judge.verdict import REASONS, UNPARSED
from eval.questions import CATEGORIES
from eval.scores import bootstrap

COVERAGE = 0.95
TURNS = (1, 2)
NAMED = 20
"""Most missing ratings of a model that are named one by one."""


def table(
    judgments: Sequence[dict], categories: Mapping[int, str], models: Sequence[str], seed: int, repeats: int = 1
) -> dict:
    """{"models": {name: summary}, "differences": {name: ...} against the first model, "duplicates":
    n}.

    Of rows for one place (question, turn, repeat) the last counts; FastChat's tools average all of
    them, so a summary has that number, too ("fastchat"), where there are such rows.

    ``categories`` maps every question that had to be rated, ``repeats`` times each turn, to its
    category. Where a model fails the gate, its summary holds counts only and no difference is
    computed with it.
    """
    ratings = {(row["model"], row["question_id"], row["turn"], row.get("repeat", 0)): row for row in judgments}
    arrays = {name: _arrays(ratings, name, list(categories), repeats) for name in models}
    summaries = {
        name: _summary(ratings, name, categories, arrays[name], seed, repeats) | _fastchat(judgments, ratings, name)
        for name in models
    }
    arrays = {name: tuple(array.sum(2) for array in pair) for name, pair in arrays.items()}
    covered = [name for name in models if summaries[name]["covered"]]
    differences = {}
    if models[0] in covered:
        differences = {
            name: _difference(arrays[name], arrays[models[0]], categories, seed)
            for name in covered
            if name != models[0]
        }
    return {
        "models": summaries,
        "differences": differences,
        "baseline": models[0],
        "duplicates": len(judgments) - len(ratings),
    }


def passed(scores: dict) -> bool:
    """Did every model pass the coverage gate?"""
    return all(summary["covered"] for summary in scores["models"].values())


def reason(ratings: Mapping, place: tuple) -> str:
    """ "valid", or why the rating does not count."""
    if place not in ratings:
        return "missing"
    score = ratings[place]["score"]
    if type(score) not in (int, float) or score != score or score == UNPARSED:
        reason = ratings[place].get("reason")
        return reason if reason in REASONS else "unparsed"
    return "valid" if 1 <= score <= 10 else "out of range"


def _fastchat(judgments: Sequence[Mapping], ratings: Mapping, name: str) -> dict:
    """{"fastchat": {"mean", "rows", "repeated"}}: the average of all rows with a rating, as
    FastChat's show_result.py prints it, where some rows repeat another's place; else None."""
    rows = [row for row in judgments if row["model"] == name]
    repeated = len(rows) - sum(place[0] == name for place in ratings)
    scores = [row["score"] for row in rows if row["score"] != UNPARSED]
    if not repeated or not scores or not all(type(score) in (int, float) for score in scores):
        return {"fastchat": None}
    return {"fastchat": {"mean": sum(scores) / len(scores), "rows": len(scores), "repeated": repeated}}


def _arrays(ratings: Mapping, name: str, questions: Sequence[int], repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """(ratings, 0 where there is no valid one; 1 where there is one), each (questions, turns,
    repeats)."""
    places = [(name, question, turn, repeat) for question in questions for turn in TURNS for repeat in range(repeats)]
    valid = np.array([reason(ratings, place) == "valid" for place in places], dtype=float)
    values = np.array(
        [ratings[place]["score"] if flag else 0 for place, flag in zip(places, valid, strict=True)], dtype=float
    )
    shape = (len(questions), len(TURNS), repeats)
    return values.reshape(shape), valid.reshape(shape)


def _summary(
    ratings: Mapping, name: str, categories: Mapping[int, str], arrays: tuple, seed: int, repeats: int
) -> dict:
    sums, counts = (array.sum(2) for array in arrays)
    places = [(name, question, turn, repeat) for question in categories for turn in TURNS for repeat in range(repeats)]
    by_place = {place: reason(ratings, place) for place in places}
    reasons = Counter(by_place.values())
    expected = len(categories) * len(TURNS) * repeats
    valid = reasons.pop("valid", 0)
    absent = [
        {"question_id": place[1], "turn": place[2], "reason": why, "refusal": ratings.get(place, {}).get("refusal", "")}
        for place, why in by_place.items()
        if why != "valid"
    ]
    result = {
        "n_valid": valid,
        "n_expected": expected,
        "invalid": dict(sorted(reasons.items())),
        "absent": absent[:NAMED],
        "covered": valid >= COVERAGE * expected,
    }
    if not result["covered"]:
        return result
    cells = {
        category: bootstrap.pooled_mean(sums[rows].sum(1), counts[rows].sum(1), seed).as_dict()
        for category, rows in _rows(categories)
        if counts[rows].any()
    }
    return result | {
        "categories": cells,
        "micro": bootstrap.pooled_mean(sums.sum(1), counts.sum(1), seed).as_dict(),
        "macro": sum(cell["mean"] for cell in cells.values()) / len(cells)
        if len(cells) == len(set(categories.values()))
        else None,
        "turns": [
            sums[:, turn].sum() / counts[:, turn].sum() if counts[:, turn].any() else None for turn in range(len(TURNS))
        ],
        "spread": _spread(*arrays) if repeats > 1 else None,
    }


def _spread(values: np.ndarray, valid: np.ndarray) -> dict:
    """How far the judge is from itself; both (questions, turns, repeats).

    {"rating_sd": standard deviation of a rating around the mean of its answer's ratings, pooled
    over answers (n - 1), "averages": the average of each repeat alone}.
    """
    count = valid.sum(2)
    several = count > 1
    mean = np.divide(values.sum(2), count, out=np.zeros_like(count), where=count > 0)
    squares = (valid * (values - mean[:, :, None]) ** 2).sum(2)
    freedom = (count - 1)[several].sum()
    averages = [
        values[:, :, k].sum() / valid[:, :, k].sum() if valid[:, :, k].any() else None for k in range(values.shape[2])
    ]
    return {"rating_sd": math.sqrt(squares[several].sum() / freedom) if freedom else None, "averages": averages}


def _rows(categories: Mapping[int, str]) -> Iterable[tuple[str, np.ndarray]]:
    """(category, its questions' row numbers), in the table's order."""
    names = np.array(list(categories.values()))
    return [(category, np.flatnonzero(names == category)) for category in CATEGORIES if category in names]


def _difference(arrays: tuple, base: tuple, categories: Mapping[int, str], seed: int) -> dict:
    """Model minus baseline, paired by question; wins, ties and losses compare a question's mean
    rating where both have one."""
    (sums, counts), (base_sums, base_counts) = [(s.sum(1), c.sum(1)) for s, c in (arrays, base)]
    both = np.flatnonzero((counts > 0) & (base_counts > 0))
    margins = sums[both] / counts[both] - base_sums[both] / base_counts[both]
    paired = {
        category: bootstrap.paired_difference(
            sums[rows], counts[rows], base_sums[rows], base_counts[rows], seed
        ).as_dict()
        for category, rows in _rows(categories)
        if counts[rows].any() and base_counts[rows].any()
    }
    return {
        "categories": paired,
        "micro": bootstrap.paired_difference(sums, counts, base_sums, base_counts, seed).as_dict(),
        "wins": int((margins > 0).sum()),
        "ties": int((margins == 0).sum()),
        "losses": int((margins < 0).sum()),
    }
