"""Step time and MFU of a layout, on paper: from times measured on one GPU and a site's link speeds.
Pure, standard library only.

Assumptions, all of them:

* forward and backward of a layer and of the head run at the share of the GPU's peak that was
  measured on one H200 for that hidden size (training/config/cost.py; optimizer taken off; sizes
  between are interpolated). The same share on other GPUs, and for the narrower matrices of tensor
  parallelism: optimistic for t > 4. Full recompute: a third more.
* the host launches a layer's kernels and messages no faster than training/config/cost.py's
  LAUNCH_S: small micro-batches wait for it.
* tensor parallelism: per layer and micro-batch two all-reduces forward and two backward (Shoeybi et
  al. 2019) of 2 T h bytes, as a ring: 2 (t - 1) / t of them through the links inside a node at
  RING, hidden behind nothing. With full recompute two more.
* pipeline: the slowest stage's time x (m + (p - 1) / v) for m micro-batches (Narayanan et al.
  2021), and two messages of 2 T h bytes a micro-batch and part, at the links between nodes where a
  pipeline leaves its node. Host and GPU wait for each other once a micro-batch and way: TURN_S.
* data parallelism: gradients in fp32 are reduce-scattered, weights in bf16 all-gathered, once a
  step, inside a node at RING, too, hidden behind nothing. The optimizer reads and writes 20 bytes a
  parameter and data rank, and 12 more for the norm and for clearing gradients.
* messages between two ranks, and what leaves a node, at 80% of the links' rate. No stragglers, no
  congestion, no loading, no saving.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from launcher.config.gpus import GPUS
from launcher.config.network import Network
from launcher.config.profile import Machine, Profile
from launcher.config.sections import Resources
from launcher.estimates import memory
from training.config.cost import FORWARD, LAUNCH_S, flops_per_token, utilisation
from training.config.shape import Shape
from training.config.trainers import SFTConfig, TrainerConfig
from training.errors import ConfigError

LINKS, MEMORY = 0.8e9, 0.85e9
"""Bytes a second of each GB/s of the datasheets."""
RING = 0.54e9
"""The same of a sum over ranks of a node: two H100, 134 MB each way, NCCL 2.28 without multicast
(24 channels; with 32 it is .58)."""
RING_S = 20e-6
"""Of each of its messages, in addition: 1 MB takes 24 microseconds, 4 MB 26, gaps included."""
TURN_S = 1.5e-3
"""Seconds that a pipeline's GPU waits at a micro-batch's messages, each way: 1b7's scoring and
7b1's steps at PP 2 on two H100. Steps with two parts a stage, whose schedule leaves the host free,
were measured to need as much (PP 4 and TP 2 x PP 2 on four)."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of a layout."""

    config: SFTConfig
    ranks: int
    seconds: float
    mfu: float
    memory_gb: float
    parts: dict[str, float]
    """Seconds of compute, bubble, launch (the GPU waits for the host), tensor, pipeline, data and
    optimizer."""

    @property
    def settings(self) -> dict[str, object]:
        """The keys that make this layout."""
        names = (
            "tensor_parallel",
            "pipeline_parallel",
            "virtual_pipeline",
            "sequence_parallel",
            "micro_batch_size",
            "recompute",
            "optimizer_precision",
        )
        return {name: getattr(self.config, name) for name in names}


def ring(ranks: int, size: float, machine: Machine, messages: int = 2) -> float:
    """Seconds of a sum of ``size`` bytes over tensor-parallel ranks of a node: a reduce-scatter and
    an all-gather, or one all-reduce."""
    return messages * RING_S + 2 * (ranks - 1) / ranks * size / (RING * machine.inside_gb_s) if ranks > 1 else 0.0


def passes(
    shape: Shape,
    config: TrainerConfig,
    machine: Machine,
    gpus_per_node: int,
    count: int,
    tokens: int,
    length: int,
    head: str = "lm",
    backward: bool = True,
) -> dict[str, float]:
    """Seconds of compute, bubble, launch, tensor and pipeline of ``count`` micro-batches of
    ``tokens`` in rows of ``length``, forward and backward or forward alone."""
    tensor, stages, virtual = config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline
    again = backward and config.recompute == "full"
    done = 4 / 3 if again else 1.0
    work, launched = (done, done) if backward else (1 / 3, FORWARD[tensor > 1])
    layer, output = flops_per_token(shape, length)
    output *= (head == "lm") * (1.0 if backward else 1 / 3)
    rate = utilisation(shape.hidden) * machine.tflops * 1e12 * tensor
    layers_of_chunks = [sum(parts) for parts in shape.chunk_layers(stages, virtual, head)]
    slowest = max(
        (layers * layer * work + (stage == stages - 1) * output) * tokens / rate
        for stage, layers in enumerate(layers_of_chunks)
    )
    inside, outside = LINKS * machine.inside_gb_s, LINKS * machine.outside_gb_s
    message = 2 * tokens * shape.hidden
    reduces = (6 if again else 4) if backward else 2
    reducing = reduces * max(layers_of_chunks) * ring(tensor, message, machine)
    waiting = max(LAUNCH_S[tensor > 1] * max(layers_of_chunks) * launched - slowest - reducing, 0.0)
    parts = {
        "compute": slowest * count,
        "bubble": slowest * (stages - 1) / virtual,
        "launch": waiting * (count + (stages - 1) / virtual),
        "tensor": count * reducing,
        "pipeline": 0.0,
    }
    if stages > 1:
        ways, rate = 2 if backward else 1, outside if tensor * stages > gpus_per_node else inside
        parts["pipeline"] = ways * (count * virtual * message / tensor / rate + (count + stages - 1) * TURN_S)
    return parts


def update(
    shape: Shape, config: TrainerConfig, ranks: int, machine: Machine, gpus_per_node: int, head: str = "lm"
) -> dict[str, float]:
    """Seconds of data and optimizer of a step."""
    data = config.model_copies(ranks)
    parameters = max(
        memory.Rank(shape, config, data, stage).parameters(head) for stage in range(config.pipeline_parallel)
    )
    between = RING * machine.inside_gb_s if ranks <= gpus_per_node else LINKS * machine.outside_gb_s
    return {
        "data": 6 * parameters * (data - 1) / data / between if data > 1 else 0.0,
        "optimizer": (20 * parameters / data + 12 * parameters) / (MEMORY * machine.memory_gb_s),
    }


def step(shape: Shape, config: SFTConfig, ranks: int, machine: Machine, gpus_per_node: int) -> Step:
    """Raises ConfigError where the layout does not divide."""
    data, length = config.data_parallel(ranks), config.seq_length
    shape.check_layout(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
    count = config.global_batch_size // (config.micro_batch_size * data)
    parts = passes(shape, config, machine, gpus_per_node, count, config.micro_batch_size * length, length)
    parts |= update(shape, config, ranks, machine, gpus_per_node)
    seconds = sum(parts.values())
    layer, head = flops_per_token(shape, length)
    useful = (shape.layers * layer + head) * config.global_batch_size * length
    memory_gb = memory.estimate(shape, config, ranks).total
    return Step(config, ranks, seconds, useful / seconds / ranks / machine.tflops / 1e12, memory_gb, parts)


def known_rates(gpu: str, network: Network) -> Machine:
    """Rates of a GPU of launcher/config/gpus.py on a network; 0 where one is not known."""
    inside = dataclasses.asdict(GPUS[gpu]) if gpu else {}
    return Machine(**inside, outside_gb_s=network.outside_gb_s)


def machine_of(profile: Profile) -> Machine:
    """The profile's own rates; where it has none, those of its GPU and its network; 0 where one is
    not known."""
    known = dataclasses.asdict(known_rates(profile.gpu, profile.network_table))
    return Machine(**{name: getattr(profile.machine, name) or value for name, value in known.items()})


def unsaid(stage: str, profile: Profile) -> str:
    """Why a profile allows no estimate of time; "" where it does."""
    unknown = [f"machine.{name}" for name, value in dataclasses.asdict(machine_of(profile)).items() if not value]
    unknown += [] if profile.gpu_memory_gb else ["gpu_memory_gb"]
    if not unknown:
        return ""
    return (
        f"{stage}: no suggestion: profile {profile.name} does not say {', '.join(unknown)}; give gpu, one of "
        f"{', '.join(GPUS)}, and network, a file of slurm/networks with outside_gb_s, or the rates in [machine]"
    )


def suggest(stage: str, shape: Shape, config: SFTConfig, resources: Resources, profile: Profile) -> str:
    """The fastest layout of a stage's ranks on a site, as words for the command line, next to the
    layout that is configured."""
    machine, ranks = machine_of(profile), resources.ranks
    if why := unsaid(stage, profile):
        return why
    now = step(shape, config, ranks, machine, resources.ranks_per_node)
    candidates = layouts(shape, config, ranks, machine, resources.ranks_per_node, profile.gpu_memory_gb)
    if not candidates:
        return (
            f"{stage}: no layout of {ranks} ranks fits {memory.FITS:.0%} of {profile.gpu_memory_gb:g} GB and divides "
            f"global_batch_size = {config.global_batch_size}"
        )
    # what is configured may be none of those that are tried, and faster
    fits = now.memory_gb <= memory.FITS * profile.gpu_memory_gb
    best = now if fits and now.seconds <= candidates[0].seconds else candidates[0]
    keys = " ".join(
        f"--set {stage}.{name}={str(value).lower()}"
        for name, value in best.settings.items()
        if value != getattr(config, name)
    )
    return (
        f"{stage}: on paper {now.seconds:.2f} s a step ({100 * now.mfu:.0f}% MFU, {now.memory_gb:.0f} GB) as "
        f"configured; fastest that fits {best.seconds:.2f} s ({100 * best.mfu:.0f}%, {best.memory_gb:.0f} GB) "
        f"with {keys or 'nothing changed'}"
    )


def layouts(
    shape: Shape, config: SFTConfig, ranks: int, machine: Machine, gpus_per_node: int, gpu_memory_gb: float
) -> list[Step]:
    """Every layout of ``ranks`` that divides and fits memory.FITS of a GPU's memory, the fastest
    first."""
    candidates = []
    for tensor in range(1, gpus_per_node + 1):
        for stages in range(1, shape.layers + 1):
            if gpus_per_node % tensor or ranks % (tensor * stages):
                continue
            for rows in (1, 2, 4, 8, 16):
                for recompute in ("none", "full"):
                    try:
                        changed = dataclasses.replace(
                            config,
                            tensor_parallel=tensor,
                            pipeline_parallel=stages,
                            virtual_pipeline=1,
                            sequence_parallel=tensor > 1,
                            micro_batch_size=rows,
                            recompute=recompute,
                        )
                        candidate = step(shape, changed, ranks, machine, gpus_per_node)
                    except (ConfigError, ValueError):
                        continue
                    if candidate.memory_gb <= memory.FITS * gpu_memory_gb:
                        candidates.append(candidate)
    return sorted(candidates, key=lambda candidate: candidate.seconds)
