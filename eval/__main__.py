"""``python -m eval config.json``: questions, answers, held-out replies, checks, judge, scores, report.

Everything made is kept under the stage's folder and found again by key, so that a second start makes only what is missing.
Exit codes: 0 done, 64 configuration, 65 bad data, 4 too few valid ratings for an average (the report says so), 1 the judge failed,
75 stopped by USR1 or TERM: every finished batch is saved, start it again.
"""

from __future__ import annotations

import json
import platform
import signal
import sys
from pathlib import Path

import torch
import transformers

from eval import answers, checks, config, heldout, report, scores, tables
from eval.config import MTBenchConfig
from eval.jsonl import DataError
from eval.stage import Stage

USAGE, BAD_DATA, GO_ON, TOO_FEW_RATINGS = 64, 65, 75, 4


def run(settings: MTBenchConfig) -> int:
    """The stage, start to end; the exit code."""
    stage = Stage(settings)
    made, replies = {}, {}
    for name in stage.folders:
        made[name], replies[name] = stage.answers(name)
    kls = {name: stage.kl(name, replies[name]) for name in stage.folders if name != stage.baseline}
    judgments, problem = stage.judgments(made)
    results = _results(stage, made, replies, kls, judgments, problem)
    _write(stage, results, made, replies, judgments)
    print(tables.title(results), *tables.missing(results), f"report: {settings.paths.report}", sep="\n", flush=True)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    return TOO_FEW_RATINGS if results["scores"] and not scores.passed(results["scores"]) else 0


def _results(stage: Stage, made: dict, replies: dict, kls: dict, judgments: list[dict], problem: str) -> dict:
    """results.json."""
    settings = stage.config
    reward_folder = settings.paths.stages.get("reward")
    categories = {question.question_id: question.category for question in stage.set.questions}
    return {
        "questions": {"label": stage.set.label, "source": settings.questions, "count": len(categories), "references": stage.set.references,
                      "sha256": stage.set.sha256},
        "template": answers.TEMPLATE, "models": stage.fingerprints, "baseline": stage.baseline, "seed": settings.seed,
        "judge": {"kind": settings.judge, "requested": settings.judge_model if settings.judge != "none" else "",
                  "returned": sorted({row["judge_id"] for row in judgments}), "problem": problem},
        "scores": scores.table(judgments, categories, list(stage.folders), settings.seed) if judgments else None,
        "heldout": heldout.summary(replies, kls, settings.seed),
        "checks": {"questions": {name: checks.check(checks.of_answers(rows)) for name, rows in made.items()},
                   "heldout": {name: checks.check(checks.of_replies(rows)) for name, rows in replies.items()}},
        "reward_model": report.reward_model(report.stage_metrics(reward_folder)) if reward_folder else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _write(stage: Stage, results: dict, made: dict, replies: dict, judgments: list[dict]) -> None:
    stages = {name: report.stage_metrics(folder) for name, folder in stage.config.paths.stages.items()}
    path = Path(stage.config.paths.report)
    report.write(stage.output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    report.write(stage.output / "table.md", tables.markdown(results))
    report.write(stage.output / "table.csv", tables.comma_separated(results))
    report.write(path, report.page(path.resolve().parent.name, results, stage.set, made, replies, judgments, stages))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m eval config.json", file=sys.stderr)
        return USAGE
    try:
        settings = config.load(arguments[0])
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return USAGE
    try:
        return run(settings)
    except DataError as error:
        print(error, file=sys.stderr)
        return BAD_DATA


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(GO_ON))
    sys.exit(main(sys.argv[1:]))
