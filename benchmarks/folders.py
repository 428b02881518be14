"""Sizes and copies of folders, and the memory of a process's children."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path


def size(folder: Path) -> float:
    """GB (1e9 bytes) of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the folder to the disk by cp; the copy is deleted."""
    os.sync()
    began = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    os.sync()
    seconds = time.monotonic() - began
    shutil.rmtree(target)
    return seconds


def resident_children() -> float:
    """The largest resident memory of a child that has ended, in GB."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
