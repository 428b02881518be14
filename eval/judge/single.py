"""Single-answer grading with FastChat's prompts and files: two ratings a question, one for each
turn.

A rating is kept under (question, model, turn, judge, prompt name, repeat) and two hashes: of the
answer, and of all that the judge is asked (its prompt with the references, and what ``settings``
names). What is there under the same key is not asked for again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval.config import MTBenchConfig
from eval.errors import DataError, InvariantError
from eval.files import rows
from eval.judge.protocol import Completion, Judge
from eval.judge.verdict import rating
from eval.questions import NEEDS_REFERENCE, Question, QuestionSet

TURNS = (1, 2)
_LONGEST_NAME = 200
"""Bytes of a judge's name in a file's name; a longer one, such as a deep folder's, keeps its
end."""


@dataclass(frozen=True)
class Request:
    """One rating to ask for."""

    question_id: int
    model: str
    turn: int
    prompt_name: str
    system: str
    user: str
    answer_id: str
    repeat: int = 0
    settings: str = ""
    """``settings`` of the judge."""

    def key(self, judge: str) -> tuple:
        return (*self.place(judge), self.answer_id, self.asked)

    @property
    def asked(self) -> str:
        """Hash of all that the rating depends on: references and judge prompts stand in the
        texts."""
        return hashed(self.system, self.user, self.settings)

    def place(self, judge: str) -> tuple:
        """The key without the hashes: where only one row may stand in the end."""
        return (self.question_id, self.model, self.turn, judge, self.prompt_name, self.repeat)

    def texts(self) -> list[str]:
        """What each request to the endpoint holds."""
        return [self.system + self.user]

    def ask(self, judge: Judge, judge_model: str) -> dict:
        """The row, in FastChat's schema. Ours are "judge_id" (the model that the endpoint says it
        used), "answer_id", "asked", "repeat", the tokens and, where there is no rating, "reason"
        and "refusal"."""
        reply = judge.complete(self.system, self.user)
        verdict = rating(reply.text, reply.finish)
        return {
            "question_id": self.question_id,
            "model": self.model,
            "judge": [judge_model, self.prompt_name],
            "user_prompt": self.user,
            "judgment": reply.text,
            "score": verdict.value,
            "turn": self.turn,
            "tstamp": time.time(),
            "answer_id": self.answer_id,
            "asked": self.asked,
            "repeat": self.repeat,
            **usage(reply),
            **why([verdict.reason], [reply]),
        }


def settings(config: MTBenchConfig, fingerprint: str) -> str:
    """Names what a verdict depends on beyond the texts; ``fingerprint``: of a local judge's folder,
    "" else."""
    return hashed(
        config.judge,
        config.judge_model,
        str(config.judge_max_tokens),
        json.dumps(config.request_fields(), sort_keys=True),
        fingerprint,
    )


def hashed(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def usage(*replies: Completion) -> dict:
    """What a row keeps of its requests; "adapted" only where the judge was asked otherwise than
    configured."""
    model = next((reply.model for reply in reversed(replies) if reply.finish != "refused"), replies[-1].model)
    adapted = list(dict.fromkeys(change for reply in replies for change in reply.adapted))
    return {
        "judge_id": model,
        "tokens_in": sum(reply.tokens_in for reply in replies),
        "tokens_out": sum(reply.tokens_out for reply in replies),
    } | ({"adapted": adapted} if adapted else {})


def why(reasons: Iterable[str], replies: Iterable[Completion]) -> dict:
    """What a row says about a missing verdict: {"reason", "refusal": the judge's words}; nothing
    where none is missing."""
    reason = next(filter(None, reasons), "")
    refusal = next((reply.refusal for reply in replies if reply.refusal), "")
    return ({"reason": reason} if reason else {}) | ({"refusal": refusal} if refusal else {})


ROW, OWN_ROW = rows.JUDGED, rows.JUDGMENT
"""Fields of a row, and of one of ours."""


def row_place(row: dict) -> tuple:
    repeat = row.get("repeat", 0)
    return (
        row["question_id"],
        row["model"],
        row["turn"],
        *row["judge"],
        repeat if isinstance(repeat, int) else str(repeat),
    )


def row_models(row: dict) -> tuple:
    return (row["model"],)


def row_key(row: dict) -> tuple:
    """Key of a judgment row; one from FastChat has no hashes and so matches no answer of ours."""
    return (*row_place(row), str(row.get("answer_id")), str(row.get("asked")))


def prompt(
    question_set: QuestionSet, question: Question, plain: str, by_reference: str, turn: int
) -> tuple[dict, dict]:
    """(judge prompt of the set, fields for it that the question fills); raises DataError without
    the prompt or the reference."""
    needs_reference = question.category in NEEDS_REFERENCE
    name = (by_reference if needs_reference else plain) + ("-multi-turn" if turn == 2 else "")
    if name not in question_set.prompts:
        raise DataError(
            f"the question set has no judge prompt {name}: put FastChat's judge_prompts.jsonl beside question.jsonl"
        )
    if needs_reference and question.reference is None:
        raise DataError(
            f"question {question.question_id} ({question.category}) has no reference answer: put FastChat's "
            "reference_answer/gpt-4.jsonl beside question.jsonl"
        )
    fields = {"question": question.turns[0], "question_1": question.turns[0], "question_2": question.turns[1]}
    if needs_reference:
        fields |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return question_set.prompts[name], fields


def request(
    question_set: QuestionSet, question: Question, answer: dict, turn: int, repeat: int = 0, settings: str = ""
) -> Request:
    """The judge's messages about turn 1 or 2 of a model_answer row."""
    chosen, fields = prompt(question_set, question, "single-v1", "single-math-v1", turn)
    turns = answer["choices"][0]["turns"]
    fields |= {"answer": turns[0], "answer_1": turns[0], "answer_2": turns[1]}
    return Request(
        question.question_id,
        answer["model_id"],
        turn,
        chosen["name"],
        chosen["system_prompt"],
        filled(chosen, **fields),
        answer["answer_id"],
        repeat,
        settings,
    )


def filled(chosen: dict, **fields: str) -> str:
    """A judge prompt with its fields; raises DataError for one that is no template of these."""
    try:
        return chosen["prompt_template"].format(**fields)
    except (ValueError, LookupError, AttributeError) as error:
        raise DataError(
            f"judge prompt {chosen['name']}: prompt_template: {error!r}; it may hold {', '.join(fields)} in braces, "
            "and {{ or }} for a brace itself"
        ) from None


def require(question_set: QuestionSet) -> None:
    """Raise DataError where a prompt or a reference is missing: before hours of generation, not
    after."""
    nothing = {"model_id": "", "answer_id": "", "choices": [{"turns": ["", ""]}]}
    for question in question_set.questions:
        for turn in TURNS:
            request(question_set, question, nothing, turn)
    known_item(question_set.prompts)


def requests(
    question_set: QuestionSet, answers: dict[str, list[dict]], repeats: int = 1, settings: str = ""
) -> list[Request]:
    """Every rating that the answers (model -> model_answer rows) need."""
    by_id = {question.question_id: question for question in question_set.questions}
    return [
        request(question_set, by_id[row["question_id"]], row, turn, repeat, settings)
        for repeat in range(repeats)
        for given in answers.values()
        for row in given
        for turn in TURNS
    ]


def judgment_path(output: str, judge: str, kind: str = "single") -> Path:
    """``kind``: "single" or "pair"."""
    name = judge.strip("/").replace("/", "_")
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{name[-_LONGEST_NAME // 8 :]}-{hashed(name)}"
    return Path(output) / "model_judgment" / f"{name}_{kind}.jsonl"


def known_item(prompts: dict[str, dict]) -> tuple[str, str]:
    """(system, user) about an answer that no one could fail to rate."""
    if "single-v1" not in prompts:
        raise DataError(
            "the question set has no judge prompt single-v1: put FastChat's judge_prompts.jsonl beside question.jsonl"
        )
    chosen = prompts["single-v1"]
    return chosen["system_prompt"], filled(
        chosen, question="What is the capital of France?", answer="The capital of France is Paris."
    )


def unique(items: Iterable, judge: str) -> list:
    """The items in order. Raises InvariantError where two ask for the same place."""
    items = list(items)
    if len({item.place(judge) for item in items}) != len(items):
        raise InvariantError("two requests for one place")
    return items
