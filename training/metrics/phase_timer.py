"""What the phases of an iteration cost: seconds and the highest memory of any rank."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Phases:
    """``with phases("score"): ...`` around each phase, then ``metrics()`` once."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        reset_peak()
        began = time.monotonic()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # or a phase's last kernels would count for the next
        self.seconds[name], self.peaks[name] = time.monotonic() - began, peak_gb()

    def metrics(self, tokens: dict[str, float]) -> dict[str, float]:
        """``tokens``: of each phase over all ranks -> seconds_NAME, tokens_per_second_NAME and
        peak_gb_NAME. A collective."""
        seconds_by_phase: dict[str, float] = {}
        for (name, seconds), peak in zip(self.seconds.items(), highest(list(self.peaks.values())), strict=True):
            seconds_by_phase |= {
                f"seconds_{name}": seconds,
                f"tokens_per_second_{name}": tokens[name] / seconds,
                f"peak_gb_{name}": peak,
            }
        return seconds_by_phase


def highest(values: list[float]) -> list[float]:
    """The largest of any rank, each. A collective."""
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def reset_peak() -> None:
    """Begin a new peak: torch's on the GPU, else this process's resident memory as Linux counts
    it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        # not every container lets a process write there: the peak is then that of its whole life
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_gb() -> float:
    """GB (1e9 bytes) at the worst moment since ``reset_peak``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match[1]) * 1024 / 1e9 if match else 0.0
