"""Asks the judge for what is not in the files yet: budget first, one known item, then many requests
at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from eval.config import MTBenchConfig
from eval.errors import JudgeError
from eval.files.jsonl import append, dump, last_by, recover
from eval.files.rows import of_kind, usable
from eval.judge import pairwise, single
from eval.judge.budget import Budget
from eval.judge.protocol import Judge, open_judge
from eval.judge.verdict import rating
from eval.questions import QuestionSet


@dataclass(frozen=True)
class Work:
    """Requests of one kind (``judge.Request`` or ``pairwise.Pair``), and the file with their
    rows."""

    path: Path
    module: object
    """eval.judge.single or eval.judge.pairwise: row_key, row_place, row_models, ROW, OWN_ROW."""
    wanted: Sequence

    @property
    def superseded(self) -> Path:
        """Rows that gave way: not FastChat's to average, but paid for, and taken back where they
        are asked for again."""
        return self.path.parent / "superseded" / self.path.name

    def stored(self) -> dict[tuple, dict]:
        """Our own whole rows by key."""
        rows = of_kind([*recover(self.superseded), *recover(self.path)], self.module.OWN_ROW)
        return last_by(rows, self.module.row_key)


def ratings(
    config: MTBenchConfig, question_set: QuestionSet, answers: dict[str, list[dict]], fingerprint: str = ""
) -> list[Work]:
    """What the configuration asks of the judge: ratings, and comparisons where ``judge_pairwise``
    says so.

    ``fingerprint``: of a local judge's folder.
    """
    model, output, settings = config.judge_model, config.paths.output, single.settings(config, fingerprint)
    requests = single.unique(single.requests(question_set, answers, config.judge_repeats, settings), model)
    works = [Work(single.judgment_path(output, model), single, requests)]
    if config.judge_pairwise:
        pairs = pairwise.requests(question_set, answers, settings)
        works.append(Work(single.judgment_path(output, model, "pair"), pairwise, pairs))
    return works


def rate(
    config: MTBenchConfig, works: Sequence[Work], prompts: dict[str, dict], done: Callable[[int], None]
) -> list[list[dict]]:
    """Each work's rows in the order of its requests: stored ones, and new ones appended as they
    come. Raises JudgeError."""
    stored = [work.stored() for work in works]
    missing = [
        [item for item in work.wanted if item.key(config.judge_model) not in rows]
        for work, rows in zip(works, stored, strict=True)
    ]
    done(sum(len(work.wanted) for work in works) - sum(map(len, missing)))
    if any(missing):
        budget = Budget(config)
        with open_judge(config, budget) as judge:
            try:
                texts = [
                    "".join(single.known_item(prompts)),
                    *(text for items in missing for item in items for text in item.texts()),
                ]
                print(budget.plan(texts, str(judge)), flush=True)
                preflight(config, judge, prompts)
                for work, items, rows in zip(works, missing, stored, strict=True):
                    _ask_all(config, judge, budget, work, items, rows, done)
            finally:
                if budget.requests:
                    print(budget.spent(), flush=True)
    for work, rows in zip(works, stored, strict=True):
        _settle(config, work, rows)
    return [
        [rows[item.key(config.judge_model)] for item in work.wanted] for work, rows in zip(works, stored, strict=True)
    ]


def paid(config: MTBenchConfig, works: Sequence[Work]) -> list[list[dict]]:
    """Each work's rows that are there, of those it asks for: what a judge that failed has still
    been paid for."""
    stored_by_work = [work.stored() for work in works]
    return [
        [rows[key] for key in (item.key(config.judge_model) for item in work.wanted) if key in rows]
        for work, rows in zip(works, stored_by_work, strict=True)
    ]


def preflight(config: MTBenchConfig, judge: Judge, prompts: dict[str, dict]) -> None:
    """Have one known item rated before the many; raises JudgeError where the judge can't be used or
    gives no rating."""
    reply = judge.complete(*single.known_item(prompts))
    verdict = rating(reply.text, reply.finish)
    if verdict.reason == "cut":
        raise JudgeError(
            f"{judge}: model {config.judge_model!r} did not come to a rating of a known answer within "
            f"mtbench.judge_max_tokens = {config.judge_max_tokens}: raise it"
        )
    if verdict.reason:
        raise JudgeError(
            f"{judge}: model {config.judge_model!r} gave no rating [[n]] to a known answer, but: "
            f"{reply.text[:200]!r}; choose another judge_model"
        )


def _ask_all(
    config: MTBenchConfig,
    judge: Judge,
    budget: Budget,
    work: Work,
    items: Sequence,
    rows: dict,
    done: Callable[[int], None],
) -> None:
    def keep(row: dict) -> None:
        append(work.path, [row])
        rows[work.module.row_key(row)] = row
        done(1)

    pool = ThreadPoolExecutor(config.judge_concurrency)
    waiting = {pool.submit(item.ask, judge, config.judge_model) for item in items}
    try:
        for future in as_completed(list(waiting)):
            waiting.discard(future)
            keep(future.result())
    except BaseException:  # an error of the judge or a signal: what is under way is waited for and kept, it is paid for
        budget.stopped.set()
        pool.shutdown(cancel_futures=True)
        for future in waiting:
            if not future.cancelled() and not future.exception():
                keep(future.result())
        raise
    pool.shutdown()


def _settle(config: MTBenchConfig, work: Work, stored: dict) -> None:
    """Leave the rows that were asked for, one a place: FastChat averages all that it finds in the
    file. Other rows of the same models by this judge (of answers that are no more, of repeats and
    questions not asked for, repeated lines) go to superseded/, as damaged ones do; other models'
    stay.
    """
    judge_model, module = config.judge_model, work.module
    wanted = {item.key(judge_model) for item in work.wanted}
    models = {module.row_models(stored[key]) for key in wanted}
    rows = recover(work.path)
    last = {module.row_key(row): number for number, row in enumerate(rows) if usable(row, module.ROW)}
    stored_rows = {
        number
        for key, number in last.items()
        if key in wanted or rows[number]["judge"][0] != judge_model or module.row_models(rows[number]) not in models
    }
    back = [stored[key] for key in (item.key(judge_model) for item in work.wanted) if key not in last]
    if len(stored_rows) < len(rows) or back:
        known = set(map(json.dumps, recover(work.superseded)))
        append(
            work.superseded,
            [row for number, row in enumerate(rows) if number not in stored_rows and json.dumps(row) not in known],
        )
        dump(work.path, [row for number, row in enumerate(rows) if number in stored_rows] + back)
