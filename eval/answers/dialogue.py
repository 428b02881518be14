"""Answers of a model to the question set, both turns, in FastChat's model_answer files.

The prompt is the dialogue format that the model was trained on; turn 2 holds the model's own answer
to turn 1. Temperatures by category are FastChat's.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from eval.answers import chat, generation
from eval.answers.generation import Prompt, Reply
from eval.config import MTBenchConfig
from eval.files.jsonl import append, last_by
from eval.questions import Question

TEMPERATURE = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "coding": 0.0,
    "extraction": 0.0,
    "math": 0.0,
    "reasoning": 0.0,
}


def stops(config: MTBenchConfig) -> tuple[str, ...]:
    """Texts that end an answer."""
    return (config.stop,) if config.stop else ()


def dialogue(
    turns: Sequence[str], answers: Sequence[str], template: str, tokenizer=None, arguments: dict | None = None
) -> str:
    """The prompt for the next answer: all questions so far (``turns``) with the answers given to
    all but the last. ``tokenizer`` and ``arguments`` (more variables) are for the template
    "chat"."""
    if template == "chat":
        messages = [
            {"role": role, "content": text}
            for pair in zip(turns, [*answers, ""], strict=True)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return chat.render_by(tokenizer, messages[:-1], arguments=arguments)
    parts = []
    for number, question in enumerate(turns):
        parts.append(template.replace("{question}", question))
        if number < len(answers) and answers[number]:
            parts.append(f" {answers[number]}")
    return "".join(parts)


def key(model: str, config: MTBenchConfig, question: Question) -> str:
    """Names everything that an answer depends on; ``model`` is the fingerprint. Answers under
    another key are made again."""
    parts = [
        model,
        question.turns,
        TEMPERATURE[question.category],
        config.template,
        config.chat_template_kwargs,
        config.stop,
        config.max_new_tokens,
        config.context_length,
        config.seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def stored(rows: Sequence[dict], keys: dict[int, str]) -> dict[int, dict]:
    """question_id -> the row of the answers' file that stands there for it under its key."""
    last = last_by(rows, lambda row: row["question_id"])
    return {number: row for number, row in last.items() if keys.get(number) == row.get("key")}


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def answer(
    model,
    tokenizer,
    name: str,
    questions: Sequence[Question],
    keys: dict[int, str],
    config: MTBenchConfig,
    path: Path,
    done: Callable[[int], None],
) -> None:
    """Answer ``questions`` and append a row for each to ``path``; ``done(n)`` after each batch."""
    is_chat = config.template == "chat"
    for batch in batches(questions, config.batch_size):
        replies: list[list[Reply]] = [[] for _ in batch]
        for turn in (1, 2):
            texts = [
                dialogue(
                    question.turns[:turn],
                    [reply.text.strip() for reply in replies_so_far],
                    config.template,
                    tokenizer,
                    config.chat_template_kwargs,
                )
                for question, replies_so_far in zip(batch, replies, strict=True)
            ]
            prompts = [
                Prompt(text, TEMPERATURE[question.category], f"question/{question.question_id}/{turn}", is_chat)
                for text, question in zip(texts, batch, strict=True)
            ]
            answers_of_turn = generation.generate(
                model,
                tokenizer,
                prompts,
                max_new_tokens=config.max_new_tokens,
                context_length=config.context_length,
                seed=config.seed,
                stop=stops(config),
            )
            for replies_so_far, reply in zip(replies, answers_of_turn, strict=True):
                replies_so_far.append(reply)
        append(
            path,
            [
                _row(name, question, replies_so_far, keys[question.question_id])
                for question, replies_so_far in zip(batch, replies, strict=True)
            ],
        )
        done(len(batch))


def _row(name: str, question: Question, replies: list[Reply], row_key: str) -> dict:
    """FastChat's schema; "finish" and "tokens" (a turn each) and "key" are ours."""
    turns = [reply.text.strip() for reply in replies]
    answer_id = hashlib.sha256(json.dumps([row_key, turns]).encode()).hexdigest()[:22]
    choice = {
        "index": 0,
        "turns": turns,
        "finish": [reply.finish for reply in replies],
        "tokens": [len(reply.tokens) for reply in replies],
    }
    return {
        "question_id": question.question_id,
        "answer_id": answer_id,
        "model_id": name,
        "choices": [choice],
        "tstamp": time.time(),
        "key": row_key,
    }
