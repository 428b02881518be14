"""Rows that an earlier start has left, by the kinds of their fields: a damaged one is made
again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from eval.files.foreign import fits, number, text, texts, whole_number
from eval.files.foreign import tables as table_or_empty

Kinds = Mapping[str, Callable[[object], bool]]


def _choice(choices: object) -> bool:
    first = choices[0]
    tokens, finish = first["tokens"], first["finish"]
    two_each = len(first["turns"]) == len(tokens) == len(finish) == 2
    return two_each and texts(first["turns"]) and texts(finish) and all(map(whole_number, tokens))


def _named_judge(value: object) -> bool:
    return texts(value) and len(value) == 2


def _is_list_of_whole(value: object) -> bool:
    return isinstance(value, list) and all(map(whole_number, value))


def _is_any_number(value: object) -> bool:
    """NaN, too: what a broken model gives is kept, or it would be made again at each start."""
    return type(value) in (int, float)


_PLACE = {"index": whole_number, "sample": whole_number, "key": text}
ANSWER: Kinds = {"question_id": whole_number, "answer_id": text, "key": text, "choices": _choice}
REPLY: Kinds = _PLACE | {
    "prompt": text,
    "response": text,
    "tokens": _is_list_of_whole,
    "finish": text,
    "gold": lambda value: value is None or number(value),
}
KL: Kinds = _PLACE | {"kl": _is_any_number, "tokens": whole_number}
SCORE: Kinds = _PLACE | {"score": _is_any_number}
JUDGED: Kinds = {"question_id": whole_number, "turn": whole_number, "model": text, "judge": _named_judge}
"""A row of a judgment file, whoever wrote it."""
COMPARED: Kinds = {
    "question_id": whole_number,
    "turn": whole_number,
    "model_1": text,
    "model_2": text,
    "judge": _named_judge,
}
_PAID: Kinds = {"judge_id": text, "asked": text, "tokens_in": whole_number, "tokens_out": whole_number}
JUDGMENT: Kinds = JUDGED | _PAID | {"score": number, "judgment": text, "answer_id": text, "repeat": whole_number}
"""One of ours."""
PAIR: Kinds = COMPARED | _PAID | {"g1_winner": text, "g2_winner": text, "answer_ids": texts}


def usable(row: object, kinds: Kinds) -> bool:
    """Has it all fields, each of its kind?"""
    fields = table_or_empty(row)
    return kinds.keys() <= fields.keys() and all(_is(fields[name], kind) for name, kind in kinds.items())


def of_kind(rows: Iterable[dict], kinds: Kinds) -> list[dict]:
    return [row for row in rows if usable(row, kinds)]


def _is(value: object, kind: Callable[[object], bool]) -> bool:
    try:
        return fits(value, kind)
    except (LookupError, AttributeError):
        return False
