"""Requests and completions of the rollout engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Order: repetition penalty, temperature, top-k, top-p, as in Hugging
    Face's generate."""

    max_new_tokens: int
    """Most tokens of a response; 0 gives an empty one."""
    temperature: float = 1.0
    """Divides the logits; 0 = greedy (the most likely token, the first of equals)."""
    top_k: int = 0
    """Only the k most likely tokens, ties included; 0 = all."""
    top_p: float = 1.0
    """Only the most likely tokens until their probability reaches p, ties included; 1 = all."""
    repetition_penalty: float = 1.0
    """Of tokens that stand in prompt or response a positive logit is divided by this, a negative
    one multiplied (Keskar et al. 2019)."""
    stop: tuple[tuple[int, ...], ...] = ()
    """Token sequences after which a response ends; they stay in it."""
    stop_strings: tuple[str, ...] = ()
    """Texts after which a response ends; the tokens that complete one stay in the response. The
    engine needs ``decode`` for these."""

    def __post_init__(self):
        checks = {
            "max_new_tokens": self.max_new_tokens >= 0,
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "stop": all(self.stop),
            "stop_strings": all(self.stop_strings),
        }
        expected = {
            "max_new_tokens": "at least 0",
            "temperature": "at least 0 (0 = greedy)",
            "top_k": "at least 0 (0 = all)",
            "top_p": "above 0 and at most 1",
            "repetition_penalty": "above 0 (1 = none)",
            "stop": "no empty sequence",
            "stop_strings": "no empty text",
        }
        for name, valid in checks.items():
            if not valid:
                raise ConfigError(f"{name} = {getattr(self, name)}: expected {expected[name]}")

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


@dataclass(frozen=True, eq=False)
class Request:
    """One response to generate. Requests with equal prompts share the prompt's keys and values, so
    n samples are n requests."""

    prompt: Sequence[int]
    sampling: Sampling
    uniforms: torch.Tensor | None = None
    """(max_new_tokens,) fp32 in [0, 1): the draw of each step, the only randomness (see ``draws``).
    None: greedy only."""


class Completion(NamedTuple):
    tokens: list[int]
    """The response, with the EOS or stop sequence that ended it."""
    logprobs: list[float]
    """Of each of ``tokens``, after penalty and temperature, before top-k and top-p; greedy: at
    temperature 1."""
    reason: str
    """"eos", "stop" or "length"."""


def draws(seed: int, iteration: int, rows: int, steps: int) -> torch.Tensor:
    """Uniforms (rows, steps) of an iteration's global batch, the same in every layout and every
    resumed run."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    return torch.rand(rows, steps, generator=generator)


def check(requests: Sequence[Request], vocab: int, context: int, decodes: bool) -> None:
    """Raises ConfigError at the first request that can't be served; ``context``: most tokens of
    prompt and response together."""
    for number, request in enumerate(requests):
        sampling, length = request.sampling, len(request.prompt)
        if not length:
            raise ConfigError(
                f"request {number}: its prompt is empty; expected at least one token (BLOOM has no token to begin with)"
            )
        if length + sampling.max_new_tokens > context:
            raise ConfigError(
                f"request {number}: {length} prompt tokens + max_new_tokens {sampling.max_new_tokens} are more than "
                f"the engine's context of {context}; shorten the prompt, ask for fewer or raise the context"
            )
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
            raise ConfigError(
                f"request {number}: token {min(request.prompt) if min(request.prompt) < 0 else max(request.prompt)} is "
                f"outside the vocabulary 0..{vocab - 1}"
            )
        drawn = 0 if request.uniforms is None else len(request.uniforms)
        if sampling.temperature and drawn < sampling.max_new_tokens:
            raise ConfigError(
                f"request {number}: {drawn} uniforms for max_new_tokens = {sampling.max_new_tokens}; "
                "give one a step (training.generation.request.draws), or temperature 0"
            )
        if sampling.stop_strings and not decodes:
            raise ConfigError(
                f"request {number}: stop_strings = {sampling.stop_strings} need an engine made with decode; or use stop"
            )
