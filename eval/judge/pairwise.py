"""Which of two answers is better: FastChat's pairwise grading, each pair in both orders. Far more
sensitive than two single ratings.

One row holds both orders: in g1 model_1's answer stands first, in g2 model_2's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from eval.errors import DataError
from eval.files import rows
from eval.judge import single
from eval.judge.protocol import Judge
from eval.judge.single import TURNS, hashed, usage, why
from eval.judge.verdict import preference
from eval.questions import Question, QuestionSet


@dataclass(frozen=True)
class Pair:
    """One comparison to ask for, in both orders."""

    question_id: int
    model_1: str
    model_2: str
    turn: int
    prompt_name: str
    system: str
    user_1: str
    """model_1's answer first."""
    user_2: str
    """model_2's answer first."""
    answer_ids: tuple[str, str]
    settings: str = ""
    """``judge.settings``."""

    def key(self, judge_model: str) -> tuple:
        return (*self.place(judge_model), *self.answer_ids, self.asked)

    @property
    def asked(self) -> str:
        """Hash of all that the verdict depends on."""
        return hashed(self.system, self.user_1, self.user_2, self.settings)

    def place(self, judge_model: str) -> tuple:
        return (self.question_id, self.model_1, self.model_2, self.turn, judge_model, self.prompt_name)

    def texts(self) -> list[str]:
        return [self.system + self.user_1, self.system + self.user_2]

    def ask(self, judge: Judge, judge_model: str) -> dict:
        """The row, in FastChat's schema; "judge_id", "answer_ids", "asked", the tokens, "reason"
        and "refusal" are ours."""
        first, second = judge.complete(self.system, self.user_1), judge.complete(self.system, self.user_2)
        verdicts = [preference(reply.text, reply.finish) for reply in (first, second)]
        winners = [verdict.value for verdict in verdicts]
        g1, g2 = (
            {"A": a, "B": b}.get(winner, winner)
            for winner, (a, b) in zip(winners, (("model_1", "model_2"), ("model_2", "model_1")), strict=True)
        )
        return {
            "question_id": self.question_id,
            "model_1": self.model_1,
            "model_2": self.model_2,
            "g1_winner": g1,
            "g2_winner": g2,
            "judge": [judge_model, self.prompt_name],
            "g1_user_prompt": self.user_1,
            "g1_judgment": first.text,
            "g2_user_prompt": self.user_2,
            "g2_judgment": second.text,
            "turn": self.turn,
            "tstamp": time.time(),
            "answer_ids": list(self.answer_ids),
            "asked": self.asked,
            **usage(first, second),
            **why((verdict.reason for verdict in verdicts), (first, second)),
        }


ROW, OWN_ROW = rows.COMPARED, rows.PAIR
"""Fields of a row, and of one of ours."""


def row_place(row: dict) -> tuple:
    return (row["question_id"], row["model_1"], row["model_2"], row["turn"], *row["judge"])


def row_models(row: dict) -> tuple:
    return (row["model_1"], row["model_2"])


def row_key(row: dict) -> tuple:
    ids = row.get("answer_ids", ())
    return (*row_place(row), *(map(str, ids) if isinstance(ids, list) else ()), str(row.get("asked")))


def _pair(question_set: QuestionSet, question: Question, one: dict, two: dict, turn: int, settings: str = "") -> Pair:
    chosen, fields = single.prompt(question_set, question, "pair-v2", "pair-math-v1", turn)

    def user(first: dict, second: dict) -> str:
        a, b = first["choices"][0]["turns"], second["choices"][0]["turns"]
        return single.filled(
            chosen,
            **fields,
            answer_a=a[0],
            answer_b=b[0],
            answer_a_1=a[0],
            answer_a_2=a[1],
            answer_b_1=b[0],
            answer_b_2=b[1],
        )

    return Pair(
        question.question_id,
        one["model_id"],
        two["model_id"],
        turn,
        chosen["name"],
        chosen["system_prompt"],
        user(one, two),
        user(two, one),
        (one["answer_id"], two["answer_id"]),
        settings,
    )


def require(question_set: QuestionSet, models: list[str]) -> None:
    """Raise DataError where nothing can be compared, or a prompt is missing."""
    if len(models) < 2:
        raise DataError(
            "mtbench.judge_pairwise compares a model with the first one: expected two or more models in paths.models"
        )
    nothing = {"model_id": "", "answer_id": "", "choices": [{"turns": ["", ""]}]}
    for question in question_set.questions:
        for turn in TURNS:
            _pair(question_set, question, nothing, nothing, turn)


def requests(question_set: QuestionSet, answers: dict[str, list[dict]], settings: str = "") -> list[Pair]:
    """Each later model (model_1) against the first (model_2), all questions, both turns."""
    by_id = {question.question_id: question for question in question_set.questions}
    baseline = {row["question_id"]: row for row in next(iter(answers.values()))}
    return [
        _pair(question_set, by_id[row["question_id"]], row, baseline[row["question_id"]], turn, settings)
        for given in list(answers.values())[1:]
        for row in given
        for turn in TURNS
    ]
