"""Step time and MFU of a layout, on paper: from times measured on one GPU and a site's link speeds. Pure, standard library only.

Assumptions, all of them:

* forward and backward of a layer and of the head run at the share of the GPU's peak that was measured on one H200 for that hidden size
  (benchmarks/train.py, optimizer taken off; sizes between are interpolated). The same share on other GPUs, and for the narrower matrices of
  tensor parallelism: optimistic for t > 4. Full recompute: a third more.
* the host launches a layer's kernels and messages no faster than LAUNCH_S: small micro-batches wait for it.
* tensor parallelism: per layer and micro-batch two all-reduces forward and two backward (Shoeybi et al. 2019) of 2 T h bytes, as a ring:
  2 (t - 1) / t of them through the links inside a node, hidden behind nothing. With full recompute two more.
* pipeline: the slowest stage's time x (m + (p - 1) / v) for m micro-batches (Narayanan et al. 2021), and two messages of 2 T h bytes a
  micro-batch and part, at the links between nodes where a pipeline leaves its node.
* data parallelism: gradients in fp32 are reduce-scattered, weights in bf16 all-gathered, once a step, hidden behind nothing. The optimizer
  reads and writes 20 bytes a parameter and data rank, and 12 more for the norm and for clearing gradients.
* links at 80% of their rate. No stragglers, no congestion, no loading, no saving.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher import memory
from launcher.config import Resources
from launcher.profile import Machine, Profile
from training.config import SFTConfig
from training.settings import ConfigError
from training.shape import Shape

UTILISATION = {1024: 0.453, 2048: 0.553, 2560: 0.527, 4096: 0.589}
"""Share of the peak in forward and backward, by hidden size: one H200, sequence 2048, no recompute."""
LAUNCH_S = {False: 0.002, True: 0.0049}
"""Seconds that the host takes for a layer of a micro-batch, forward and backward, however little it computes; True: with messages of tensor
parallelism. The first is no less than 1b7's at 2,048 tokens on one H200, the second 7b1's at 2,048 tokens, TP 2 x PP 2, on four H100."""

_H800 = Machine(tflops=989, memory_gb_s=3350, inside_gb_s=200, outside_gb_s=50)
MACHINES = {
    "a100-hdr-infiniband": Machine(tflops=312, memory_gb_s=2039, inside_gb_s=300, outside_gb_s=25),
    "h800-roce": _H800,
    "h800-ndr-infiniband": _H800,
    "one-machine": Machine(tflops=989, memory_gb_s=4800, inside_gb_s=450, outside_gb_s=50),
}
"""What a profile's ``machine`` leaves at 0, by its ``network`` (launcher/nccl.py); "one-machine" is taken for H200s."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of a layout."""

    config: SFTConfig
    ranks: int
    seconds: float
    mfu: float
    memory_gb: float
    parts: dict[str, float]
    """Seconds of compute, bubble, launch (the GPU waits for the host), tensor, pipeline, data and optimizer."""

    @property
    def settings(self) -> dict[str, object]:
        """The keys that make this layout."""
        names = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "sequence_parallel", "micro_batch_size", "recompute",
                 "optimizer_precision")
        return {name: getattr(self.config, name) for name in names}


def utilisation(hidden: int) -> float:
    sizes = sorted(UTILISATION)
    if hidden <= sizes[0] or hidden >= sizes[-1]:
        return UTILISATION[sizes[0] if hidden <= sizes[0] else sizes[-1]]
    above = next(size for size in sizes if size >= hidden)
    below = sizes[sizes.index(above) - 1]
    part = (hidden - below) / (above - below)
    return UTILISATION[below] + part * (UTILISATION[above] - UTILISATION[below])


def flops_per_token(shape: Shape, length: int) -> tuple[float, float]:
    """Forward and backward of (one layer, the head): 6 x parameters of the matrices, and attention over half of the square."""
    matrices = sum(one.size[0] * one.size[1] for one in shape.table.layer if len(one.size) == 2)
    return 6 * matrices + 6 * shape.hidden * length, 6 * shape.vocab * shape.hidden


def step(shape: Shape, config: SFTConfig, ranks: int, machine: Machine, gpus_per_node: int) -> Step:
    """Raises ConfigError where the layout does not divide."""
    tensor, stages, virtual = config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline
    data = config.data_parallel(ranks)
    shape.check_layout(tensor, stages, virtual)
    count = config.global_batch_size // (config.micro_batch_size * data)
    tokens = config.micro_batch_size * config.seq_length
    layer, head = flops_per_token(shape, config.seq_length)
    rate = utilisation(shape.hidden) * machine.tflops * 1e12 * tensor
    again = 4 / 3 if config.recompute == "full" else 1.0
    held = [sum(parts) for parts in shape.chunk_layers(stages, virtual, "lm")]
    slowest = max((layers * layer * again + (stage == stages - 1) * head) * tokens / rate for stage, layers in enumerate(held))
    inside, outside = 0.8e9 * machine.inside_gb_s, 0.8e9 * machine.outside_gb_s
    message = 2 * tokens * shape.hidden
    reduces = (6 if config.recompute == "full" else 4) * max(held)
    reducing = reduces * message * 2 * (tensor - 1) / tensor / inside if tensor > 1 else 0.0
    waiting = max(LAUNCH_S[tensor > 1] * max(held) * again - slowest - reducing, 0.0)
    parts = {"compute": slowest * count, "bubble": slowest * (stages - 1) / virtual, "launch": waiting * (count + (stages - 1) / virtual),
             "tensor": count * reducing, "pipeline": 0.0}
    if stages > 1:
        parts["pipeline"] = count * 2 * virtual * message / tensor / (outside if tensor * stages > gpus_per_node else inside)
    parameters = max(memory.Rank(shape, config, data, stage).parameters("lm") for stage in range(stages))
    between = inside if ranks <= gpus_per_node else outside
    parts["data"] = 6 * parameters * (data - 1) / data / between if data > 1 else 0.0
    parts["optimizer"] = (20 * parameters / data + 12 * parameters) / (0.85e9 * machine.memory_gb_s)
    seconds = sum(parts.values())
    useful = (shape.layers * layer + head) * config.global_batch_size * config.seq_length
    made = memory.estimate(shape, config, ranks).total
    return Step(config, ranks, seconds, useful / seconds / ranks / machine.tflops / 1e12, made, parts)


def machine_of(profile: Profile) -> Machine:
    """The profile's own numbers, and those of its network where it has none; 0 where neither is known."""
    known = dataclasses.asdict(MACHINES.get(profile.network, Machine()))
    return Machine(**{name: getattr(profile.machine, name) or value for name, value in known.items()})


def suggest(stage: str, shape: Shape, config: SFTConfig, asked: Resources, profile: Profile) -> str:
    """The fastest layout of a stage's ranks on a site, as words for the command line, beside the layout that is configured."""
    machine, ranks = machine_of(profile), asked.ranks
    unknown = [f"machine.{name}" for name, value in dataclasses.asdict(machine).items() if not value]
    unknown += [] if profile.gpu_memory_gb else ["gpu_memory_gb"]
    if unknown:
        return (f"{stage}: no suggestion: profile {profile.name} does not say {', '.join(unknown)}; the machine's rates are known of "
                f"network = {', '.join(MACHINES)}")
    now = step(shape, config, ranks, machine, asked.ranks_per_node)
    found = layouts(shape, config, ranks, machine, asked.ranks_per_node, profile.gpu_memory_gb)
    if not found:
        return (f"{stage}: no layout of {ranks} ranks fits 90% of {profile.gpu_memory_gb:g} GB and divides global_batch_size = "
                f"{config.global_batch_size}")
    fits = now.memory_gb <= 0.9 * profile.gpu_memory_gb  # what is configured may be none of those that are tried, and faster
    best = now if fits and now.seconds <= found[0].seconds else found[0]
    keys = " ".join(f"--set {stage}.{name}={str(value).lower()}" for name, value in best.settings.items() if value != getattr(config, name))
    return (f"{stage}: on paper {now.seconds:.2f} s a step ({100 * now.mfu:.0f}% MFU, {now.memory_gb:.0f} GB) as configured; fastest that "
            f"fits {best.seconds:.2f} s ({100 * best.mfu:.0f}%, {best.memory_gb:.0f} GB) with {keys or 'nothing changed'}")


def layouts(shape: Shape, config: SFTConfig, ranks: int, machine: Machine, gpus_per_node: int, gpu_memory_gb: float) -> list[Step]:
    """Every layout of ``ranks`` that divides and fits 90% of a GPU's memory, the fastest first."""
    found = []
    for tensor in range(1, gpus_per_node + 1):
        for stages in range(1, shape.layers + 1):
            if gpus_per_node % tensor or ranks % (tensor * stages):
                continue
            for rows in (1, 2, 4, 8, 16):
                for recompute in ("none", "full"):
                    try:
                        changed = dataclasses.replace(
                            config, tensor_parallel=tensor, pipeline_parallel=stages, virtual_pipeline=1, sequence_parallel=tensor > 1,
                            micro_batch_size=rows, recompute=recompute)
                        made = step(shape, changed, ranks, machine, gpus_per_node)
                    except (ConfigError, ValueError):
                        continue
                    if made.memory_gb <= 0.9 * gpu_memory_gb:
                        found.append(made)
    return sorted(found, key=lambda made: made.seconds)
