"""The gold score of a reply: what a held-out prompt asks for, checked in the text itself. Pure."""

from __future__ import annotations

import re

from eval.errors import DataError

KEYS = {"must": list, "must_not": list, "max_words": int}


def validate(rubric: object, where: str) -> None:
    """Raise DataError unless ``rubric`` is {"must": [str], "must_not": [str], "max_words": int};
    ``where`` names it."""
    if not isinstance(rubric, dict) or set(rubric) != set(KEYS):
        raise DataError(
            f'{where}: rubric = {rubric!r}: expected an object with exactly "must", "must_not" and "max_words"'
        )
    for key, kind in KEYS.items():
        if not isinstance(rubric[key], kind) or isinstance(rubric[key], bool):
            raise DataError(f"{where}: rubric.{key} = {rubric[key]!r}: expected {kind.__name__}")
    for phrase in rubric["must"] + rubric["must_not"]:
        if not isinstance(phrase, str) or not phrase.strip():
            raise DataError(f"{where}: rubric phrase {phrase!r}: expected a non-empty string")


def contains(text: str, phrase: str) -> bool:
    """Does ``phrase`` occur in ``text`` on whole words, whatever the case and the kind of white
    space between its words?"""
    pattern = r"\s+".join(re.escape(word) for word in phrase.split())
    return re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE) is not None


def gold(response: str, rubric: dict) -> float:
    """Score of ``response``, 0..1: 0 where it is empty, else 0.6 if every ``must`` phrase occurs, +
    0.2 if no ``must_not`` phrase does, + 0.2 if it has at most ``max_words`` words (counted between
    white space)."""
    if not response.strip():
        return 0.0
    has_all = all(contains(response, phrase) for phrase in rubric["must"])
    has_none = not any(contains(response, phrase) for phrase in rubric["must_not"])
    is_short = len(response.split()) <= rubric["max_words"]
    # tenths: 0.6 + 0.2 + 0.2 in floats need not be 1
    return (6 * has_all + 2 * has_none + 2 * is_short) / 10
