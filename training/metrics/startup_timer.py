"""Where the time goes from the start of a process to the end of its first iteration. Imports the
standard library only."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def _age() -> float:
    """Seconds since this process began; since this module was imported where the system does not
    tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


_last = time.monotonic() - _age()
_parts: dict[str, float] = {}


def mark(part: str) -> None:
    """What was done since the last mark, or since the process began, was ``part``. The first of a
    name counts."""
    global _last
    now = time.monotonic()
    if part not in _parts:
        _parts[part] = now - _last
    _last = now


def compiling() -> str:
    """For the log: seconds that torch's compiler has taken in this process, and how many of its
    graphs an earlier process had made; "" where nothing was compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    seconds = dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0
    if not seconds:
        return ""
    hits, misses = (dynamo.counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    return f" (compiling {seconds:.1f} s of it, {hits} of {hits + misses} graphs kept from before)"


def report() -> str:
    """For the log: each part with its seconds, and their sum; compiling is in the last."""
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in _parts.items())
    return f"start: {parts}{compiling()}; together {sum(_parts.values()):.1f} s"
