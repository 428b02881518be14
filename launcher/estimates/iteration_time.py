"""Phase times of an iteration of PPO or GRPO on paper, by launcher/estimates/step_time.py's model.
Pure, standard library only.

Assumptions in addition to step_time.py's:

* within 10% phase by phase of what PPO of 7b1 + 7b1 took on one H200, of 7b1 + 7b1 and 1b7 + 1b7 on
  two H100, and of 1b7 + 1b7 at TP 2 x PP 2 on four (which LAUNCH_S's forward share was taken from).
* samples are as long as prompt_length + response_length allow; packed ones are divided as
  training/config/cost.py's ``micro_batches`` does.
* scoring: a forward pass of policy, reference (unless kl_coef is 0), reward and, of PPO, value
  model, one after the other, each over all samples as one run of the pipeline. Updates: a step of
  each trained model a minibatch, as in SFT. With offload = "all" optimizers also change places
  there; what else is offloaded moves during the scoring.
* generation: each replica computes its prompts, then reads, token by token, its weights and its
  rows' keys and values at DECODE of its memory's rate, and takes LAYER_S a layer besides; cache for
  all ``generation_batch_size`` rows is taken as there. Of tensor parallelism two sums a layer.
  Beginning and ending take START_S. Weights for another layout than training's are received through
  the links, and each byte passes memory six times (sent and received: a copy, the message, a copy).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.config.profile import Machine, Profile
from launcher.config.sections import Resources
from launcher.estimates import memory, step_time
from training.config.cost import MORE_ROWS, flops_per_token, group, launched_tokens, micro_batches, utilisation
from training.config.shape import Shape
from training.config.trainers import PPOConfig, RolloutConfig

DECODE = 0.87
"""Share of the memory's rate (datasheet) that attention of a decode step reads at: 1b7 and 7b1 on
one H100 and one H200."""
LAYER_S = 40e-6
"""What a layer of a decode step takes longer than reading its weights at that rate: seven small
kernels, their gaps, and products too small for it. 1b7 at 64 and 128 rows, on an H100; 7b1's steps
(benchmarks/generation/rollout.py) come out within 2% at 128 rows, 9% too short at 256."""
START_S = 0.2
"""Of a rollout: making engines and the cache, capturing CUDA graphs, gathering replies (1b7 on two
H100)."""
IN_PLACE_S = 0.007
"""What the weights' way takes where nothing moves: 7b1's names and views, on the host of four
H100."""

TO_HOST_GB_S, BOTH_WAYS_GB_S = 49, 39
"""Of each GPU to its node's pinned memory, alone and with the other way at the same time
(benchmarks/training/ppo.py on an H200)."""


@dataclass(frozen=True)
class Iteration:
    """Seconds of each phase."""

    generate: float
    score: float
    update: float
    micro_batch: tuple[int, int]
    """(rows, tokens of a row)."""

    @property
    def seconds(self) -> float:
        return self.generate + self.score + self.update


def iteration(shape: Shape, config: RolloutConfig, ranks: int, machine: Machine, gpus_per_node: int) -> Iteration:
    """Raises ConfigError where the layout does not divide."""
    data, length = config.data_parallel(ranks), config.longest_row
    rows, size = micro_batch(shape, config, data, machine)
    count, minibatches = rows // size, config.rollout_batch_size // config.global_batch_size
    learners = ["lm", "scalar"] if isinstance(config, PPOConfig) else ["lm"]

    def seconds(of: int, head: str, backward: bool) -> float:
        return sum(
            step_time.passes(shape, config, machine, gpus_per_node, of, size * length, length, head, backward).values()
        )

    score = sum(
        seconds(count * minibatches, head, False) for head in (*learners, *(["lm"] if config.kl_coef else []), "scalar")
    )
    step = sum(
        seconds(count, head, True) + sum(step_time.update(shape, config, ranks, machine, gpus_per_node, head).values())
        for head in learners
    )
    update = config.updates * step + changing_places(shape, config, ranks, len(learners))
    return Iteration(generate(shape, config, ranks, machine), score, update, (size, length))


def changing_places(shape: Shape, config: RolloutConfig, ranks: int, learners: int) -> float:
    """Seconds in which the optimizers of offload = "all" move and nothing else is done: each makes
    room for the next, the last leaves."""
    if config.offload != "all":
        return 0.0
    states = [size for _, size in memory.estimate(shape, config, ranks).host[-learners:]]
    return sum(states[1:]) / BOTH_WAYS_GB_S + states[0] / TO_HOST_GB_S


def micro_batch(shape: Shape, config: RolloutConfig, data: int, machine: Machine) -> tuple[int, int]:
    """Rows of a minibatch's data-parallel rank and of a micro-batch, a sample each."""
    rows, length = -(-config.global_batch_size // data), config.longest_row
    if not config.micro_batch_tokens:
        return rows, config.micro_batch_size
    unit = group(config)
    rows = -(-rows // unit) * unit
    least = launched_tokens(shape, config.tensor_parallel, length, machine.tflops)
    # A few empty rows more may divide better: training.data.packing tries as many.
    tried = {
        count: micro_batches(count, length, config.micro_batch_tokens // length, config.pipeline_parallel, unit, least)
        for count in range(rows, MORE_ROWS * rows + 1, unit)
    }
    rows = min(tried, key=lambda count: (tried[count][0], count))
    return rows, tried[rows][1]


def generate(shape: Shape, config: RolloutConfig, ranks: int, machine: Machine) -> float:
    size = config.generation_tensor_parallel or config.tensor_parallel
    samples = -(-config.rollout_batch_size * size // ranks)
    turns = -(-samples // config.generation_batch_size)
    rows, read = samples / turns, DECODE * 1e9 * machine.memory_gb_s
    weights = 2 * shape.parameters() / size
    cache = (
        4
        * shape.layers
        * shape.kv_heads
        * shape.head_dim
        * rows
        * (config.prompt_length + config.response_length / 2)
        / size
    )

    def messages(tokens: float) -> float:
        return 2 * shape.layers * step_time.ring(size, 2 * shape.hidden * tokens, machine, 1)

    layer, _ = flops_per_token(shape, config.prompt_length)
    computed = shape.layers * layer / 3 / (utilisation(shape.hidden) * machine.tflops * 1e12 * size)
    prefill = samples * config.prompt_length * computed + messages(samples * config.prompt_length)
    decode = turns * config.response_length * ((weights + cache) / read + shape.layers * LAYER_S + messages(rows))
    moved = weights if size != config.tensor_parallel or config.pipeline_parallel > 1 else 0.0
    return moving(machine, moved, 6 * moved) + prefill + START_S + decode


def moving(machine: Machine, links: float, memory_: float) -> float:
    """Seconds of the weights' way to generation's layout, of which so many bytes pass a GPU's links
    and its memory."""
    return (
        IN_PLACE_S
        + links / (step_time.LINKS * machine.inside_gb_s)
        + memory_ / (step_time.MEMORY * machine.memory_gb_s)
    )


def suggest(stage: str, shape: Shape, config: RolloutConfig, resources: Resources, profile: Profile) -> str:
    """What an iteration takes as configured, and with the fastest token budget that fits, as words
    for the command line."""
    if why := step_time.unsaid(stage, profile):
        return why
    machine, limit = step_time.machine_of(profile), memory.FITS * profile.gpu_memory_gb

    def at_tokens(tokens: int) -> tuple[float, float, Iteration]:
        changed = dataclasses.replace(config, micro_batch_tokens=tokens)
        estimated = iteration(shape, changed, resources.ranks, machine, resources.ranks_per_node)
        return estimated.seconds, memory.estimate(shape, changed, resources.ranks).total, estimated

    seconds, used, now = at_tokens(config.micro_batch_tokens)
    advice = (
        f"{stage}: on paper {seconds:.1f} s an iteration as configured (generation {now.generate:.1f}, scoring "
        f"{now.score:.1f}, updates {now.update:.1f}, all replies as long as they may be; {used:.0f} GB)"
    )
    best, least = config.micro_batch_tokens, (seconds if used <= limit else float("inf"), used)
    for power in range(8):
        tokens = config.longest_row * 2**power
        took, needed, _ = at_tokens(tokens)
        if needed <= limit and (took < 0.98 * least[0]):
            best, least = tokens, (took, needed)
    if best == config.micro_batch_tokens:
        return f"{advice}; no other micro_batch_tokens that fits is faster"
    return (
        f"{advice}; fastest that fits {least[0]:.1f} s ({least[1]:.0f} GB) with --set {stage}.micro_batch_tokens={best}"
    )
