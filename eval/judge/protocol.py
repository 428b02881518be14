"""What a judge is: it completes a conversation of a system text and a user's turn.

A judge is a module here with ``open_judge(config, budget)`` and a row in ``eval.judges.JUDGES``.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from eval.config import MTBenchConfig
from eval.judge.budget import Budget


class Completion(NamedTuple):
    text: str
    model: str
    """Id of the model as the endpoint returns it: an alias drifts."""
    tokens_in: int
    tokens_out: int
    """As the endpoint counts them; where it doesn't, from the length of the text."""
    finish: str = "stop"
    """"stop", "length" (cut at judge_max_tokens) or "refused"."""
    refusal: str = ""
    """Why there is no text, in the endpoint's words."""
    adapted: tuple[str, ...] = ()
    """What the judge was asked otherwise than configured, because it does not take it."""


class Judge(Protocol):
    """``str(judge)`` names it in messages, an endpoint by its address."""

    def complete(self, system: str, user: str) -> Completion:
        """The judge's reply; many threads call this at once.

        The first call is about a known item, and no other call runs meanwhile. Raises JudgeError
        where the judge can't be used, or where the budget is used up; what the judge refuses about
        a single request is a Completion "refused".
        """
        ...


def open_judge(config: MTBenchConfig, budget: Budget) -> AbstractContextManager[Judge]:
    """The judge that ``config.judge`` names, for as long as the block.

    A judge that costs something calls ``budget.request`` before each request and ``budget.settle``
    after it. Raises JudgeError and DataError.
    """
    return importlib.import_module(config.judge_kind.module).open_judge(config, budget)
