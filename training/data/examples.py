"""Rows of token ids -> examples of at most a given length. No torch: ``plan`` uses it, too.

A prompt and its reply are tokenised separately and their ids joined, so that the loss mask can't be
off by one merge.
"""

from __future__ import annotations

from typing import NamedTuple

from training.data.tokenised import Tokenised


class Example(NamedTuple):
    """One prompt with one reply."""

    tokens: list[int]
    """Ids of prompt and reply, with the token that ends it."""
    response_start: int
    """Index of the reply's first id; the reply, with its end, reaches to the end."""
    learnt: tuple[tuple[int, int], ...] = ()
    """(start, end) of the ids that are learnt; () for the reply."""
    complete: bool = True
    """False where the reply lost its end."""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, end) of the ids that a loss counts. Nothing predicts a row's first id."""
        spans = self.learnt or [(self.response_start, len(self.tokens))]
        return [(max(start, 1), end) for start, end in spans]


def sft_example(row: Tokenised, seq_length: int) -> Example:
    """A prompt and its reply in at most ``seq_length`` ids. ``_join`` says what is cut of longer
    ones."""
    return _join(row, seq_length)[0]


def comparison_example(row: Tokenised, seq_length: int) -> list[tuple[Example, float]]:
    """A query with its K replies as K (example, score). The query is cut in the same way for all
    its replies."""
    return list(zip(_join(row, seq_length), row.scores, strict=True))


def prompt_tokens(row: Tokenised, prompt_length: int) -> list[int]:
    """The prompt in at most ``prompt_length`` ids. A longer one loses its head, but neither BOS nor
    its cue."""
    if len(row.prompt) <= prompt_length:
        return row.prompt
    opening = min(row.opening, prompt_length - 1)
    return row.prompt[:opening] + row.prompt[opening - prompt_length :]


def _join(row: Tokenised, seq_length: int) -> list[Example]:
    """Examples of one prompt, all with the same prompt ids.

    Too long for ``seq_length``: the prompt loses its head (after BOS), down to half a row at most
    (so the cue stays); a reply that still does not fit loses its tail, and its end with it: it did
    not end there.
    """
    room = max(seq_length - max(map(len, row.replies)), seq_length // 2)
    head = prompt_tokens(row, room)
    removed = len(row.prompt) - len(head)

    def place(index: int) -> int:
        """Index in the example of an id of the row."""
        return min(index if index <= row.opening else max(row.opening, index - removed), seq_length)

    spans = [(place(start), place(end)) for start, end in row.learnt]
    learnt = tuple((start, end) for start, end in spans if start < end)
    return [
        Example((head + reply)[:seq_length], len(head), learnt, len(head) + len(reply) <= seq_length)
        for reply in row.replies
    ]
