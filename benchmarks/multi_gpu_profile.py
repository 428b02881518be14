"""Where the time of a pipeline's step goes: the last part of benchmarks/multi_gpu_speed.py's SFT, for its log."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from benchmarks.multi_gpu_common import say
from benchmarks.train import CUDA, sync, timed
from training.phases import highest
from training.step import Batch, Learner, Objective

STEPS = 2
LINES = 14
"""Of the longest operations."""


def between_stages(size: str, learner: Learner, batches: list[Batch], objective: Objective, step: Callable[[], None]) -> None:
    """The same steps without the host's wait for the GPU after each message (megatron-core's batch_p2p_sync), then the profile of a step of
    a few micro-batches on each rank."""
    config = learner.model.config
    if config.batch_p2p_comm:
        config.batch_p2p_sync = False
        (seconds,) = highest([timed(step, 1, STEPS)])
        say(part="no wait", size=size, ok=True, step_s=seconds)
        config.batch_p2p_sync = True
    if CUDA:
        few = batches[: 2 * config.pipeline_model_parallel_size]
        kernels = torch.profiler.ProfilerActivity.CUDA
        profiled([kernels], len(few), lambda: learner.step(few, objective))
        found = profiled([kernels, torch.profiler.ProfilerActivity.CPU], len(few), lambda: learner.step(few, objective))
        if dist.get_rank() in (0, dist.get_world_size() - 1):
            for order in ("self_cpu_time_total", "self_cuda_time_total"):
                print(found.table(sort_by=order, row_limit=LINES, max_name_column_width=60), flush=True)


def profiled(activities: list, count: int, run: Callable[[], object]):
    """Says what ``run`` took, and how long the GPU was at work; recording what the host does slows it down."""
    dist.barrier()
    sync()
    with torch.profiler.profile(activities=activities) as profiler:
        began = time.monotonic()
        run()
        sync()
        seconds = time.monotonic() - began
    found = profiler.key_averages()
    kernels = [event for event in found if event.device_type == torch.autograd.DeviceType.CUDA]
    messages = [event for event in kernels if "nccl" in event.key.lower()]
    busy, talking = (sum(event.self_device_time_total for event in events) / 1e6 for events in (kernels, messages))
    print(f"profile: rank {dist.get_rank()}: {count} micro-batches in {seconds:.3f} s; {sum(event.count for event in kernels)} kernels "
          f"{busy:.3f} s, of it NCCL's {sum(event.count for event in messages)} {talking:.3f} s", flush=True)
    return found
