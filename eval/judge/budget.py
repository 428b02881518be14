"""What judging may cost, what it is expected to cost, and what it did cost."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from eval.config import MTBenchConfig
from eval.errors import JudgeError

CHARACTERS = 4
"""Characters of a token, roughly, in English; used only where the endpoint does not count tokens
itself."""
EXPECTED_TOKENS = 250
"""Length of a judgment that the estimate assumes: GPT-4's to MT-Bench are about this long."""


class Budget:
    """Counts requests and tokens of one start, and refuses the request that would break a limit.
    Used by many threads."""

    def __init__(self, config: MTBenchConfig):
        self.config = config
        self.requests = self.tokens_in = self.tokens_out = 0
        self._reserved = [0, 0]
        """Tokens in and out that the requests under way are expected to need."""
        self._longest = min(EXPECTED_TOKENS, config.judge_max_tokens)
        """Length of a judgment to count with: the longest so far, or what is expected."""
        self.stopped = threading.Event()
        """Set: no further request is sent, and no one waits before asking again."""
        self._lock = threading.Lock()

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """In ``judge_currency``."""
        return (tokens_in * self.config.judge_price_in + tokens_out * self.config.judge_price_out) / 1e6

    def plan(self, prompts: Iterable[str], url: str) -> str:
        """What the requests with these prompts are expected to need, in a sentence; raises
        JudgeError where a limit forbids it."""
        lengths = [len(prompt) for prompt in prompts]
        expected_in, expected_out = (
            sum(lengths) / CHARACTERS,
            len(lengths) * min(EXPECTED_TOKENS, self.config.judge_max_tokens),
        )
        text = (
            f"judge {self.config.judge_model} at {url}: {len(lengths)} requests, about {_thousands(expected_in)} "
            f"tokens sent and {_thousands(expected_out)} written back, "
            f"{self._price(self.cost(expected_in, expected_out), 'about ')}; limits: {self._limits()}"
        )
        if 0 < self.config.judge_max_requests < len(lengths):
            raise JudgeError(
                f"{text}. The requests exceed mtbench.judge_max_requests = {self.config.judge_max_requests}: raise it"
            )
        if 0 < self.config.judge_max_cost < self.cost(expected_in, expected_out):
            raise JudgeError(f"{text}. That exceeds mtbench.judge_max_cost = {self.config.judge_max_cost:g}: raise it")
        return text

    def request(self, characters: int) -> tuple[int, int]:
        """Count a request of this length that is about to be sent; JudgeError instead where it
        would break a limit, together with those under way. Returns the tokens set aside for it,
        (in, out), for ``settle``."""
        with self._lock:
            if self.stopped.is_set():
                raise JudgeError("stopped")
            limit, ceiling = self.config.judge_max_requests, self.config.judge_max_cost
            if limit and self.requests >= limit:
                raise JudgeError(
                    f"mtbench.judge_max_requests = {limit} is used up; "
                    "ratings so far are kept: raise it and start again"
                )
            reserve = characters // CHARACTERS, self._longest
            held_in, held_out = self._reserved
            expected = self.cost(self.tokens_in + held_in + reserve[0], self.tokens_out + held_out + reserve[1])
            if ceiling and expected > ceiling:
                raise JudgeError(
                    f"mtbench.judge_max_cost = {ceiling:g} {self.config.judge_currency} is used up; ratings so far are "
                    "kept: raise it and start again"
                )
            self.requests += 1
            self._reserve(reserve, 1)
            return reserve

    def settle(self, reserve: tuple[int, int], tokens_in: int, tokens_out: int) -> None:
        """Put what a request has cost in the place of what was set aside for it; (0, 0) for one
        that was refused."""
        with self._lock:
            self._reserve(reserve, -1)
            self.tokens_in += tokens_in
            self.tokens_out += tokens_out
            self._longest = max(self._longest, tokens_out)

    def _reserve(self, tokens: tuple[int, int], sign: int) -> None:
        self._reserved = [held + sign * count for held, count in zip(self._reserved, tokens, strict=True)]

    def spent(self) -> str:
        """What it was, in a sentence."""
        return (
            f"judge {self.config.judge_model}: {self.requests} requests, {_thousands(self.tokens_in)} tokens sent and "
            f"{_thousands(self.tokens_out)} written back, {self._price(self.cost(self.tokens_in, self.tokens_out))}"
        )

    def _price(self, cost: float, about: str = "") -> str:
        if not (self.config.judge_price_in or self.config.judge_price_out):
            return "cost unknown (no mtbench.judge_price_in and judge_price_out)"
        return f"{about}{cost:.2f} {self.config.judge_currency}"

    def _limits(self) -> str:
        requests = f"{self.config.judge_max_requests} requests" if self.config.judge_max_requests else ""
        cost = f"{self.config.judge_max_cost:g} {self.config.judge_currency}" if self.config.judge_max_cost else ""
        return " and ".join(filter(None, (requests, cost))) or "none"


def _thousands(tokens: float) -> str:
    return f"{tokens:.0f}" if tokens < 1000 else f"{tokens / 1000:.0f}k"
