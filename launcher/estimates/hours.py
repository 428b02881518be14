"""How long a stage's work takes, on paper, against its job's time limit. Pure, standard library
only.

By launcher/estimates/step_time.py and launcher/estimates/iteration_time.py: no loading, saving or
evaluating, and replies as long as they may be. A reward model's step is a forward and backward pass
over both replies of a comparison; DPO's has a forward pass of the reference besides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.config.profile import Profile
from launcher.config.sections import Resources
from launcher.estimates import iteration_time, step_time
from launcher.estimates.memory import REPLIES
from training.config.shape import Shape
from training.config.trainers import DPOConfig, RewardConfig, RolloutConfig, SFTConfig, TrainerConfig
from training.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """All iterations of a trainer."""

    hours: float
    gpu_hours: float
    requeues: int
    """How often its job reaches its time limit, saves and waits in the queue again."""


def work(stage: str, shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile) -> Work | None:
    """What a stage takes; None where the site's machine is not known, or the layout does not
    divide."""
    if step_time.unsaid(stage, profile):
        return None
    try:
        hours = config.iterations * _seconds(shape, config, resources, profile) / 3600
    except (ConfigError, ValueError):
        return None
    return Work(
        hours,
        hours * (resources.nodes + resources.spares) * resources.gpus_per_node,
        max(0, math.ceil(hours * 60 / resources.minutes) - 1),
    )


def _seconds(shape: Shape, config: TrainerConfig, resources: Resources, profile: Profile) -> float:
    """Of one iteration."""
    machine, ranks, node = step_time.machine_of(profile), resources.ranks, resources.ranks_per_node
    if isinstance(config, RolloutConfig):
        return iteration_time.iteration(shape, config, ranks, machine, node).seconds
    if isinstance(config, SFTConfig):
        return step_time.step(shape, config, ranks, machine, node).seconds
    head = "scalar" if isinstance(config, RewardConfig) else "lm"
    count = config.global_batch_size // (config.micro_batch_size * config.data_parallel(ranks))
    tokens = config.micro_batch_size * REPLIES * config.seq_length
    parts = [
        step_time.passes(shape, config, machine, node, count, tokens, config.seq_length, head),
        step_time.update(shape, config, ranks, machine, node, head),
    ]
    if isinstance(config, DPOConfig):
        parts.append(
            step_time.passes(shape, config, machine, node, count, tokens, config.seq_length, head, backward=False)
        )
    return sum(sum(part.values()) for part in parts)
