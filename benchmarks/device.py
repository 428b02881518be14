"""Times and memory of the GPU, or of the CPU where there is none."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PRECISION = "bf16" if CUDA else "fp32"
"""Of weights and optimizer: a CPU is fast in fp32 only."""


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], object]) -> float:
    """Seconds until the GPU has done what ``function`` starts."""
    synchronize()
    began = time.monotonic()
    function()
    synchronize()
    return time.monotonic() - began


def median_seconds(function: Callable[[], object], warm: int, steps: int) -> float:
    """The median of ``steps`` calls, after ``warm`` calls that are not counted."""
    seconds = [seconds_of(function) for _ in range(warm + steps)]
    return statistics.median(seconds[warm:])


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    reset_peak()


def reset_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """The most GB that torch had allocated since ``reset_peak``; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0
