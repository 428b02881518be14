"""One set of results from the evaluations of one or several runs: models get their run's name,
scores are computed together where that means something. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eval.report.run_folder import Evaluation, Run
from eval.scores import ratings

SAME = (
    ("questions", "sha256"),
    ("questions", "references"),
    ("judge", "returned"),
    ("judge", "repeats"),
    ("judge", "settings"),
    ("template",),
    ("seed",),
    ("max_new_tokens",),
)
"""What has to be equal for ratings to stand in one table."""
HELDOUT = ("gold", "gold_difference", "kl", "score", "win_rate", "length_controlled", "scored_by")


def names(runs: Sequence[Run]) -> dict[str, Run]:
    """A different name for each run: its folder's, with as much of the path before it as that
    needs."""
    merged = {}
    for run in runs:
        parts = run.folder.resolve().parts
        others = [other.folder.resolve().parts for other in runs if other is not run]
        depth = next((n for n in range(1, len(parts)) if all(parts[-n:] != other[-n:] for other in others)), 1)
        merged["/".join(parts[-depth:])] = run
    return merged


def contradictions(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Sentences on what forbids one table of all runs' ratings; none where nothing does."""
    merged = []
    for path in SAME:
        values = {run: _at(one.results, path) for run, one in evaluations.items()}
        if len({str(value) for value in values.values()}) > 1:
            shown = (
                values
                if path != ("questions", "sha256")
                else {run: _at(one.results, ("questions", "label")) for run, one in evaluations.items()}
            )
            merged.append(f"{' '.join(path)} differs: " + "; ".join(f"{run}: {value}" for run, value in shown.items()))
    for run, one in evaluations.items():
        count = _at(one.results, ("questions", "count"))
        if one.results["scores"] and len(one.questions) != count:
            merged.append(
                f"{run}: {one.folder / 'question.jsonl'} has {len(one.questions)} questions, {count} were rated"
            )
    return merged


def _at(value, path: Sequence[str]):
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def renamed(run: str, one: Evaluation) -> Evaluation:
    """The same evaluation with models called run/model."""

    def name(model: str) -> str:
        return f"{run}/{model}"

    def keys(values: Mapping | None) -> dict | None:
        return None if values is None else {name(model): value for model, value in values.items()}

    old = one.results
    heldout, table, pairwise = old["heldout"], old["scores"], old["pairwise"]
    results = old | {
        "models": keys(old["models"]),
        "baseline": name(old["baseline"]),
        "heldout": heldout | {key: keys(heldout[key]) for key in HELDOUT} | {"baseline": name(heldout["baseline"])},
        "checks": {source: keys(values) for source, values in old["checks"].items()},
        "harness": keys(old["harness"]),
        "pairwise": {name(model): row | {"baseline": name(row["baseline"])} for model, row in pairwise.items()}
        if pairwise
        else None,
        "scores": None
        if table is None
        else table
        | {
            "models": keys(table["models"]),
            "differences": keys(table["differences"]),
            "baseline": name(table["baseline"]),
        },
    }
    return Evaluation(
        one.folder,
        results,
        one.questions,
        keys(one.answers),
        keys(one.replies),
        [row | {"model": name(row["model"])} for row in one.judgments],
        [row | {key: name(row[key]) for key in ("model_1", "model_2")} for row in one.pairs],
    )


def together(by_run: Mapping[str, Evaluation]) -> dict:
    """results.json of several renamed evaluations that may share a table; differences are to the
    first run's first model."""
    evaluations = list(by_run.values())
    first, common = evaluations[0].results, beside(evaluations)
    models = {name: mark for one in evaluations for name, mark in one.results["models"].items()}
    categories = {row["question_id"]: row["category"] for row in evaluations[0].questions}
    judgments = [row for one in evaluations for row in one.judgments]
    rated = all(one.results["scores"] for one in evaluations) and judgments
    pairs = {name: row for one in evaluations for name, row in (one.results["pairwise"] or {}).items()}
    table = (
        ratings.table(judgments, categories, list(models), first["seed"], first["judge"]["repeats"]) if rated else None
    )
    judges = [one.results["judge"] for one in evaluations]
    costs = [judge["cost"] for judge in judges]
    judge = (
        first["judge"]
        | {name: sum(judge[name] for judge in judges) for name in ("requests", "tokens_in", "tokens_out")}
        | {"cost": None if None in costs or len({judge["currency"] for judge in judges}) > 1 else sum(costs)}
    )
    return first | {
        "models": models,
        "scores": table,
        "pairwise": pairs or None,
        "judge": judge,
        "heldout": first["heldout"] | common["heldout"],
        "checks": common["checks"],
        "harness": common["harness"] or None,
        "reward_model": {
            f"{run}/{stage}": row for run, one in by_run.items() for stage, row in one.results["reward_model"].items()
        },
    }


def beside(evaluations: Sequence[Evaluation]) -> dict:
    """What needs no common judge: gold score, KL, checks and harness of all models."""
    all_results = [one.results for one in evaluations]
    heldout = {
        key: {name: value for one in all_results for name, value in one["heldout"][key].items()} for key in HELDOUT
    }
    checks = {
        source: {name: row for one in all_results for name, row in one["checks"][source].items()}
        for source in all_results[0]["checks"]
    }
    baselines = {name: one["heldout"]["baseline"] for one in all_results for name in one["models"]}
    return {
        "models": {name: mark for one in all_results for name, mark in one["models"].items()},
        "heldout": heldout,
        "checks": checks,
        "harness": {name: tasks for one in all_results for name, tasks in (one["harness"] or {}).items()},
        "baselines": baselines,
        "prompts": max(one["heldout"]["prompts"] for one in all_results),
        "rubrics": bool(heldout["gold"]),
    }
