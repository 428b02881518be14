"""Rows of token ids -> examples of a length: what is cut where a row is longer. No torch: ``plan``
asks it, too.

A prompt and its reply are tokenised apart and their ids joined, so that the loss mask can't be off
by one merge.
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
    """A prompt and its reply in at most ``seq_length`` ids; what is cut where it is longer: see
    ``_join``."""
    return _join(row, tokenizer.eos_id, seq_length)[0]


def comparison_example(row: Tokenised, tokenizer: Tokenizer, seq_length: int) -> list[tuple[Example, float]]:
    """A query with its K replies as K (example, score): one query, cut alike for all of its
    replies."""
    return list(zip(_join(row, tokenizer.eos_id, seq_length), row.scores, strict=True))


def prompt_tokens(row: Tokenised, prompt_length: int) -> list[int]:
    """The prompt in at most ``prompt_length`` ids: an over-long one loses its head, never BOS or
    its cue."""
    if len(row.prompt) <= prompt_length:
        return row.prompt
    kept = min(row.opening, prompt_length - 1)
    return row.prompt[:kept] + row.prompt[kept - prompt_length :]


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
