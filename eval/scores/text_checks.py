"""What a generated text shows without any judge: emptiness, cut ends, repetition, diversity,
length, role markers. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from eval.errors import InvariantError

_ROLE_MARKER = re.compile(r"(^|\n)\s*(Human|Assistant):")
NGRAM = 4
"""Words of the n-grams that count as repetition."""


@dataclass(frozen=True)
class Text:
    text: str
    """Before the end-of-sequence token or the stop string."""
    tokens: int
    """Generated tokens, with what ended the text."""
    finish: str
    """"eos", "stop" (the model began the next speaker's turn) or "length"."""


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated_share(text: str) -> float:
    """Share of the text's word 4-grams that occurred in it before, 0..1; 0 for a text of fewer than
    four words."""
    grams = ngrams(text.split(), NGRAM)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Sequence[str], n: int) -> float:
    """distinct-n (Li et al. 2016): different word n-grams over all n-grams of all texts; 0 where
    there is none."""
    grams = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def has_role_marker(text: Text) -> bool:
    """Does the answer speak for the other side, or was it stopped as it began to?"""
    return text.finish == "stop" or _ROLE_MARKER.search(text.text) is not None


def check(texts: Sequence[Text]) -> dict:
    """Measures over one model's texts (at least one): shares are 0..1, lengths are means."""
    if not texts:
        raise InvariantError("check: no texts")
    n = len(texts)
    strings = [text.text for text in texts]
    return {
        "texts": n,
        "empty": sum(not string.strip() for string in strings) / n,
        "truncated": sum(text.finish == "length" for text in texts) / n,
        "eos_rate": sum(text.finish == "eos" for text in texts) / n,
        "role_markers": sum(map(has_role_marker, texts)) / n,
        "repeated_ngrams": sum(map(repeated_share, strings)) / n,
        "distinct_1": distinct(strings, 1),
        "distinct_2": distinct(strings, 2),
        "words": sum(len(string.split()) for string in strings) / n,
        "tokens": sum(text.tokens for text in texts) / n,
    }


def of_answers(rows: Sequence[dict]) -> list[Text]:
    """Both turns of model_answer rows."""
    texts = []
    for row in rows:
        choice = row["choices"][0]
        texts += [Text(*turn) for turn in zip(choice["turns"], choice["tokens"], choice["finish"], strict=True)]
    return texts


def of_replies(rows: Sequence[dict]) -> list[Text]:
    """Replies to held-out prompts."""
    return [Text(row["response"], len(row["tokens"]), row["finish"]) for row in rows]
