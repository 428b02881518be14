"""``python -m eval config.json``: questions, answers, held-out replies, checks, judge, scores,
report.

Everything made is kept under the stage's folder and found again by key, so that a second start
makes only what is missing. With RANK and WORLD_SIZE set, the ranks share the answers; rank 0 does
the rest. Exit codes: 0 done, 64 configuration, 65 bad data, 73 a file can't be read or written, 74
full disk, 4 too few valid ratings for an average (the report says so), 1 the judge failed or any
other error, 75 stopped by USR1 or TERM (every finished batch is saved), or another start is at work
in the same folder: start it again. An error leaves its class for the launcher (eval.error_report).
"""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import traceback
from pathlib import Path

import torch
import transformers

from eval import config, error_report, harness
from eval.answers import chat
from eval.config import MTBenchConfig
from eval.errors import Busy, DataError, HarnessError, SurroundingsError
from eval.report import page, reward_accuracy, table
from eval.scores import gold_score, ratings, reward_model, text_checks, win_rate
from eval.stage import Stage
from eval.work_split import Ranks, exclusive

USAGE, GO_ON = 64, 75


def run(settings: MTBenchConfig) -> int:
    """The stage, start to end; the exit code."""
    with contextlib.ExitStack() as stack:
        return _run(chat.settled(settings), stack)


def _run(settings: MTBenchConfig, stack: contextlib.ExitStack) -> int:
    """``held`` keeps the output folder to the end, longer than the ranks are together."""
    answers, replies = {}, {}
    with Ranks() as ranks:
        if ranks.rank == 0:
            stack.enter_context(exclusive(settings.paths.output))
            print(f"template: {settings.template!r}, stop: {settings.stop!r}", flush=True)
        stage = Stage(settings, ranks)
        for name in stage.folders:
            answers[name], replies[name] = stage.answers(name)
        kls = {name: stage.kl(name, replies[name]) for name in stage.folders if name != stage.baseline}
        scored = {name: rows for name in stage.folders if (rows := stage.scores(name, replies[name]))}
    if ranks.rank:
        return 0
    judgments, pairs, problem = stage.judgments(answers)
    harness_results, harness_problem = _harness(settings, stage)
    results = _results(stage, answers, replies, kls, judgments, pairs, problem)
    results["heldout"] |= reward_model.summary(scored, replies, settings.seed) | {
        "scored_by": dict.fromkeys(scored, stage.scorer)
    }
    results |= {"harness": harness_results, "harness_problem": harness_problem}
    stage.write_questions()
    table.write(stage.output, results)
    page.write(page.collect([Path(settings.paths.report).parent]), Path(settings.paths.report))
    print(table.title(results), *table.missing(results), f"report: {settings.paths.report}", sep="\n", flush=True)
    for text in filter(None, (problem, harness_problem)):
        print(text, file=sys.stderr)
    if problem:
        return error_report.write(error_report.JUDGE, problem)
    if harness_problem:
        return error_report.write(error_report.HARNESS, harness_problem)
    if table.covered(results):
        return 0
    return error_report.write(error_report.TOO_FEW_RATINGS, " ".join(table.missing(results)))


def _harness(settings: MTBenchConfig, stage: Stage) -> tuple[dict | None, str]:
    try:
        return harness.run(settings, stage.fingerprints), ""
    except HarnessError as error:
        return None, str(error)


def _results(
    stage: Stage, answers: dict, replies: dict, kls: dict, judgments: list[dict], pairs: list[dict], problem: str
) -> dict:
    """results.json."""
    settings = stage.config
    categories = {question.question_id: question.category for question in stage.set.questions}
    lengths = {
        (name, row["question_id"], turn + 1): len(text)
        for name, rows in answers.items()
        for row in rows
        for turn, text in enumerate(row["choices"][0]["turns"])
    }
    judge = judge_facts(settings, judgments, pairs, problem) | {"settings": stage.judge_settings()}
    if problem:  # some ratings are paid for, but not all are there: no number
        judgments, pairs = [], []
    return {
        "questions": {
            "label": stage.set.label,
            "source": settings.questions,
            "count": len(categories),
            "references": stage.set.references,
            "sha256": stage.set.sha256,
        },
        "template": settings.template,
        "stop": settings.stop,
        "models": stage.fingerprints,
        "baseline": stage.baseline,
        "seed": settings.seed,
        "max_new_tokens": settings.max_new_tokens,
        "judge": judge,
        "scores": ratings.table(judgments, categories, list(stage.folders), settings.seed, settings.judge_repeats)
        if judgments
        else None,
        "pairwise": win_rate.table(pairs, lengths, list(categories), settings.seed) if pairs else None,
        "heldout": gold_score.summary(replies, kls, settings.seed),
        "checks": {
            "questions": {name: text_checks.check(text_checks.of_answers(rows)) for name, rows in answers.items()},
            "heldout": {
                name: text_checks.check(text_checks.of_replies(rows)) for name, rows in replies.items() if rows
            },
        },
        "reward_model": reward_accuracy.summary(settings.paths.stages),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def judge_facts(settings: MTBenchConfig, judgments: list[dict], pairs: list[dict], problem: str) -> dict:
    """Who judged, what it was asked to be, how often, and what all ratings of the table have cost
    together, also in earlier starts."""
    rows = judgments + pairs
    tokens_in, tokens_out = (sum(row[name] for row in rows) for name in ("tokens_in", "tokens_out"))
    priced = settings.judge_price_in or settings.judge_price_out
    cost = (tokens_in * settings.judge_price_in + tokens_out * settings.judge_price_out) / 1e6
    return {
        "kind": settings.judge,
        "requested": settings.judge_model if settings.judge_kind else "",
        "returned": sorted({row["judge_id"] for row in rows if row.get("reason") != "refused"}),
        "adapted": sorted({change for row in rows for change in row.get("adapted", [])}),
        "problem": problem,
        "repeats": settings.judge_repeats,
        "requests": len(judgments) + 2 * len(pairs),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "cost": cost if priced else None,
        "currency": settings.judge_currency,
    }


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(
            f"usage: python -m eval config.json; on its own, without a run: python -m eval.mtbench --help\n\n{__doc__}"
        )
        return 0
    if len(arguments) != 1:
        print(
            "usage: python -m eval config.json; on its own, without a run: python -m eval.mtbench --help",
            file=sys.stderr,
        )
        return USAGE
    try:
        settings = config.load(arguments[0])
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return error_report.write(error_report.BAD_CONFIG, f"{arguments[0]}: {error}")
    error_report.versions()
    return guarded(settings)


def guarded(settings: MTBenchConfig) -> int:
    """``run``; an error as its exit code and last words, and 75 while another start is at work."""
    try:
        return run(settings)
    except Busy as error:
        print(error, file=sys.stderr)
        error_report.write("", str(error))
        return GO_ON
    except (DataError, SurroundingsError) as error:
        print(error, file=sys.stderr)
        return error_report.of(error)
    except Exception as error:
        traceback.print_exc()
        return error_report.of(error)


def heed_signals() -> None:
    """USR1 and TERM end the process with 75: it wants to go on. They are repeated: those after the
    first do nothing."""

    def stop(*_) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(GO_ON)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
