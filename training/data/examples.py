"""Rows of token ids -> examples of at most a given length. No torch: ``plan`` uses it, too.

A prompt and its reply are tokenised separately and their ids joined, so that the loss mask can't be
off by one merge.
"""

from __future__ import annotations

from typing import NamedTuple

from training.data.cache import Tokenised
from training.data.tokenizer import Tokenizer


class Example(NamedTuple):
    """One prompt with one reply."""

    tokens: list[int]
    """Ids of prompt, reply and EOS."""
    response_start: int
    """Index of the reply's first id; the reply, with its EOS, reaches to the end."""


def sft_example(row: Tokenised, tokenizer: Tokenizer, seq_length: int) -> Example:
    """A prompt and its reply in at most ``seq_length`` ids. ``_join`` says what is cut of longer
    ones."""
    return _join(row, tokenizer.eos_id, seq_length)[0]


def comparison_example(row: Tokenised, tokenizer: Tokenizer, seq_length: int) -> list[tuple[Example, float]]:
    """A query with its K replies as K (example, score). The query is cut in the same way for all
    its replies."""
    return list(zip(_join(row, tokenizer.eos_id, seq_length), row.scores, strict=True))


def prompt_tokens(row: Tokenised, prompt_length: int) -> list[int]:
    """The prompt in at most ``prompt_length`` ids. A longer one loses its head, but neither BOS nor
    its cue."""
    if len(row.prompt) <= prompt_length:
        return row.prompt
    opening = min(row.opening, prompt_length - 1)
    return row.prompt[:opening] + row.prompt[opening - prompt_length :]


def _join(row: Tokenised, eos_id: int, seq_length: int) -> list[Example]:
    """Examples of one prompt, all with the same prompt ids.

    Too long for ``seq_length``: the prompt loses its head (after BOS), down to half a row at most
    (so the cue stays); a reply that still does not fit loses its tail, and the EOS with it: it did
    not end there.
    """
    replies = [reply + [eos_id] for reply in row.replies]
    room = max(seq_length - max(map(len, replies)), seq_length // 2)
    head = prompt_tokens(row, room)
    return [Example((head + reply)[:seq_length], len(head)) for reply in replies]
