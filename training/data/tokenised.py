"""Rows as token ids: what the cache keeps and what examples are made of. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from training.data.dialogue import CUE
from training.data.rows import HH_TEXT, Row
from training.data.styles import HHText, Style
from training.data.tokenizer import Tokenizer
from training.data.turns import BadRow, Unusable


class Tokenised(NamedTuple):
    """One row."""

    prompt: list[int]
    replies: list[list[int]]
    """With the token that ends each; none for "rlhf", one for "sft", several for "reward"."""
    scores: list[float]
    """One a reply for "reward", else none."""
    opening: int = 0
    """Ids at the prompt's beginning that stay when its head is cut: BOS, or none."""
    learnt: list[tuple[int, int]] = []
    """(start, end) of what is learnt in the ids of prompt and first reply; [] for the reply
    alone."""


class RowTokenizer(Protocol):
    """Rows of one style -> ids. training/data/template.py has the chat template's."""

    name: str
    """The style: "hh" or "chat"."""
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    """Ids that end a reply."""
    bos: list[int]
    """Ids that a row may begin with and keeps when its head is cut."""
    cue: int
    """Ids of the assistant's mark that every prompt ends with, BOS included."""
    digest: list
    """What the ids depend on, in addition to the tokenizer and the row."""

    def style(self) -> Style:
        """How rows are put into words for it."""

    def problems(self, rows: Sequence[tuple[int, Row]]) -> list[BadRow | Unusable | None]:
        """What is wrong with each (line, row) beyond its fields."""

    def tokenise(self, rows: Sequence[Row], stage: str) -> list[Tokenised]:
        """The ids that ``stage`` reads of each row."""


class TextTokenizer:
    """Rows of HH's dialogue text."""

    name, digest = "hh", []

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.stop_ids, self.bos = tokenizer, tokenizer.stop_ids, tokenizer.bos

    @property
    def cue(self) -> int:
        return len(self.tokenizer.bos) + len(self.tokenizer.encode(CUE))

    def style(self) -> HHText:
        return HH_TEXT

    def problems(self, rows: Sequence[tuple[int, Row]]) -> list[None]:
        return [None] * len(rows)

    def tokenise(self, rows: Sequence[Row], stage: str) -> list[Tokenised]:
        """Prompt and reply are tokenised separately, so that the loss mask can't be off by one
        merge. EOS ends a reply."""
        tokenizer, end = self.tokenizer, [self.tokenizer.eos_id]
        replies = [row.responses if stage == "reward" else (row.best,) if stage == "sft" else () for row in rows]
        prompts = tokenizer.encode_prompts([row.prompt for row in rows])
        ids = iter(tokenizer.encode_replies([text for texts in replies for text in texts]))
        return [
            Tokenised(
                prompt,
                [next(ids) + end for _ in texts],
                list(row.scores) if stage == "reward" else [],
                len(tokenizer.bos),
            )
            for row, prompt, texts in zip(rows, prompts, replies, strict=True)
        ]


def lengths(row: Tokenised) -> int:
    """Ids of a row: its prompt's and, if it has replies, the longest reply's."""
    return len(row.prompt) + max(map(len, row.replies), default=0)
