"""Replies of a language model to prompts, for people to read, for the reward model to be calibrated
on, for others to score."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training.data.batches import shard
from training.data.tokenizer import Tokenizer
from training.distributed import groups
from training.generation.engine import EngineLimits
from training.generation.request import Request, Sampling
from training.generation.rollout_workers import Replicas

ROWS = 64
"""Most replies that are made at once; with it the key-value cache is bounded."""


def limits(context: int) -> EngineLimits:
    """``context``: most tokens of a prompt with its reply."""
    return EngineLimits(context, ROWS, cache_tokens=ROWS * context)


def replies(
    replicas: Replicas, prompts: list[list[int]], steps: int, uniforms: torch.Tensor | None = None
) -> list[list[int]]:
    """Ids of a reply of at most ``steps`` tokens to each prompt, with the EOS that ended it: drawn
    at temperature 1 with its row of ``uniforms`` (prompts, steps), without them greedy.
    Data-parallel ranks share the prompts out; all get all. A collective."""
    ranks = groups.data_ranks()
    indices = [*range(len(prompts)), *[len(prompts) - 1] * (-len(prompts) % ranks)]
    sampling = Sampling(steps, 0.0 if uniforms is None else 1.0)
    made = replicas.generate(
        [
            Request(prompts[index], sampling, None if uniforms is None else uniforms[index])
            for index in shard(indices, groups.data_rank(), ranks)
        ]
    )
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, [one.tokens for one in made], group=parallel_state.get_data_parallel_group())
    return [tokens for rank in everyone for tokens in rank][: len(prompts)]


@dataclass(frozen=True)
class Samples:
    """What a model says to some prompts every ``every`` iterations (0: never), in words."""

    every: int
    say: Callable[[], list[tuple[str, str]]]
    """(prompt, reply) of each; collective."""

    def due(self, iteration: int) -> bool:
        return bool(self.every) and iteration % self.every == 0


REPLIES = "replies.jsonl"


def keep(
    stage: str, iteration: int, batch: dict[str, torch.Tensor], tokenizer: Tokenizer, stop_ids: Collection[int]
) -> None:
    """Append the held-out replies of ``iteration``, whole rows "tokens" with their "response_mask"
    (B, T), to the stage's replies.jsonl: {"iteration", "index" (of the prompt's row), "response",
    "tokens" (generated ids), "ended"}. An iteration that is evaluated again, after a crash, stands
    there twice, alike."""
    with open(Path(stage) / REPLIES, "a", encoding="utf-8") as file:
        for index, (row, inside) in enumerate(zip(batch["tokens"], batch["response_mask"], strict=True)):
            tokens = row[inside].tolist()
            made = {
                "iteration": iteration,
                "index": index,
                "response": tokenizer.decode(tokens),
                "tokens": tokens,
                "ended": tokens[-1] in stop_ids,
            }
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
