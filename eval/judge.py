"""Single-answer grading with FastChat's prompts and files: two ratings a question, one for each turn.

A rating is kept under (question, model, turn, judge, prompt name, answer); what is there under the same key is not asked for again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from eval.config import MTBenchConfig
from eval.endpoint import Endpoint, JudgeError
from eval.jsonl import DataError, append, last_by, recover
from eval.questions import NEEDS_REFERENCE, Question, QuestionSet
from eval.scores import UNPARSED, parse_rating


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

    def key(self, judge: str) -> tuple:
        return (self.question_id, self.model, self.turn, judge, self.prompt_name, self.answer_id)


def row_key(row: dict) -> tuple:
    """Key of a judgment row; one from FastChat has no answer_id and so matches no answer of ours."""
    return (row["question_id"], row["model"], row["turn"], *row["judge"], row.get("answer_id"))


def request(prompts: dict[str, dict], question: Question, answer: dict, turn: int) -> Request:
    """The judge's messages about turn 1 or 2 of a model_answer row; raises DataError without the prompt or the reference."""
    by_reference = question.category in NEEDS_REFERENCE
    name = ("single-math-v1" if by_reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
    if name not in prompts:
        raise DataError(f"the question set has no judge prompt {name}: put FastChat's judge_prompts.jsonl beside question.jsonl")
    if by_reference and question.reference is None:
        raise DataError(f"question {question.question_id} ({question.category}) has no reference answer: put FastChat's "
                        "reference_answer/gpt-4.jsonl beside question.jsonl")
    turns = answer["choices"][0]["turns"]
    fields = {"question": question.turns[0], "answer": turns[0], "question_1": question.turns[0], "answer_1": turns[0],
              "question_2": question.turns[1], "answer_2": turns[1]}
    if by_reference:
        fields |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    prompt = prompts[name]
    return Request(question.question_id, answer["model_id"], turn, name, prompt["system_prompt"],
                   prompt["prompt_template"].format(**fields), answer["answer_id"])


def require(question_set: QuestionSet) -> None:
    """Raise DataError where a prompt or a reference is missing: before hours of generation, not after."""
    nothing = {"model_id": "", "answer_id": "", "choices": [{"turns": ["", ""]}]}
    for question in question_set.questions:
        for turn in (1, 2):
            request(question_set.prompts, question, nothing, turn)


def requests(question_set: QuestionSet, answers: dict[str, list[dict]]) -> list[Request]:
    """Every rating that the answers (model -> model_answer rows) need."""
    by_id = {question.question_id: question for question in question_set.questions}
    return [request(question_set.prompts, by_id[row["question_id"]], row, turn)
            for rows in answers.values() for row in rows for turn in (1, 2)]


def judgment_path(output: str, judge: str) -> Path:
    return Path(output) / "model_judgment" / f"{judge.replace('/', '_')}_single.jsonl"


def preflight(endpoint: Endpoint, prompts: dict[str, dict]) -> None:
    """Rate one known item before the many; raises JudgeError where the endpoint can't be used or gives no rating."""
    prompt = prompts["single-v1"]
    text, _ = endpoint.complete(prompt["system_prompt"], prompt["prompt_template"].format(
        question="What is the capital of France?", answer="The capital of France is Paris."))
    if parse_rating(text) == UNPARSED:
        raise JudgeError(f"{endpoint.url}: model {endpoint.model!r} gave no rating [[n]] to a known answer, but: {text[:200]!r}; "
                         "choose another judge_model")


def rate(config: MTBenchConfig, wanted: Iterable[Request], prompts: dict[str, dict], done: Callable[[int], None]) -> list[dict]:
    """All judgment rows for ``wanted``, in its order: stored ones, and new ones appended as they come. Raises JudgeError."""
    path = judgment_path(config.paths.output, config.judge_model)
    stored = last_by(recover(path), row_key)
    wanted = list(wanted)
    missing = [item for item in wanted if item.key(config.judge_model) not in stored]
    done(len(wanted) - len(missing))
    if missing:
        endpoint = Endpoint(config.judge_url, config.judge_model, config.judge_key_variable)
        preflight(endpoint, prompts)
        with ThreadPoolExecutor(config.judge_concurrency) as pool:
            futures = {pool.submit(endpoint.complete, item.system, item.user): item for item in missing}
            try:
                for future in as_completed(futures):
                    row = _row(futures[future], config.judge_model, *future.result())
                    append(path, [row])
                    stored[row_key(row)] = row
                    done(1)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error or a signal: only what is under way is waited for
    return [stored[item.key(config.judge_model)] for item in wanted]


def _row(item: Request, judge: str, text: str, judge_id: str) -> dict:
    """FastChat's schema; "judge_id" (the model that the endpoint says it used) and "answer_id" are ours."""
    return {"question_id": item.question_id, "model": item.model, "judge": [judge, item.prompt_name], "user_prompt": item.user,
            "judgment": text, "score": parse_rating(text), "turn": item.turn, "tstamp": time.time(),
            "judge_id": judge_id, "answer_id": item.answer_id}
