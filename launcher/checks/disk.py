"""What a run will write, against free disk and the user's quota. Standard library only."""

from __future__ import annotations

import getpass
import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.config.stages import ALL
from training.config.shape import Shape
from training.config.trainers import PPOConfig, TrainerConfig
from training.errors import ConfigError

GB = 1e9
QUOTA_S = 5
"""Seconds that a quota command may take: a dead file server must not hang ``plan``."""


@dataclass(frozen=True)
class FreeSpace:
    """What may still be written below a folder."""

    free_gb: float
    where: str
    """What sets the limit, in words."""


def checkpoint_gb(config: TrainerConfig, shape: Shape) -> float:
    """One saved iteration: weights and fp32 master copy, two moments, of each trained model: 14
    bytes a parameter under bf16, 16 under fp32 (measured: 8.37 MB for the demo's 523,000
    parameters). Frozen weights with low-rank adapters count only as themselves."""
    word, parameters = 2 if config.precision == "bf16" else 4, shape.parameters()
    learning = shape.layers * shape.adapters(config.lora_rank) or parameters
    models = 2 if isinstance(config, PPOConfig) else 1
    return models * (word * (parameters + (learning if config.lora_rank else 0)) + 12 * learning) / GB


def checkpoints(config: TrainerConfig) -> int:
    """Most checkpoints on disk at once: those kept, and the one being written.

    >>> from types import SimpleNamespace as Config
    >>> checkpoints(Config(save_every=10, iterations=10**15, keep_every=15, keep_checkpoints=3))
    33333333333336
    """
    saved, every = saves(config), config.save_every
    if config.keep_checkpoints >= saved:
        return saved
    # the last iteration that is not kept as one of the newest
    older = (saved - config.keep_checkpoints) * every
    return min(
        saved, config.keep_checkpoints + (older // math.lcm(every, config.keep_every) if config.keep_every else 0) + 1
    )


def saves(config: TrainerConfig) -> int:
    """Iterations that are saved: each multiple of ``save_every``, and the last."""
    return -(-config.iterations // config.save_every)


def save_number(config: TrainerConfig, iteration: int) -> int:
    """Which of the saved iterations it is, from 1; 0 where it is not saved."""
    if iteration == config.iterations:
        return saves(config)
    return (
        iteration // config.save_every
        if 0 < iteration < config.iterations and iteration % config.save_every == 0
        else 0
    )


def free_space(folder: Path) -> FreeSpace:
    """The least of the file system's free space and the user's quotas there. Quotas that can't be
    asked for are left out."""
    while not folder.exists():
        folder = folder.parent
    folder = folder.resolve()
    disk = os.statvfs(folder)
    limits = [FreeSpace(disk.f_bavail * disk.f_frsize / GB, f"free on the file system of {folder}")]
    mount = next(parent for parent in (folder, *folder.parents) if os.path.ismount(parent))
    for command, what, parse in _quotas(folder, mount):
        if shutil.which(command[0]) and (free_gb := parse(_output(command))) is not None:
            limits.append(FreeSpace(free_gb, f"left of {what} on {mount}"))
    return min(limits, key=lambda limit: limit.free_gb)


def _quotas(folder: Path, mount: Path) -> Iterator[tuple[tuple[str, ...], str, Callable[[str], float | None]]]:
    """(command, whose quota, how its output is read): the user's, the group's and the project's."""
    group = str(os.stat(folder).st_gid)
    yield ("quota", "-w", "-p", "-f", str(mount)), "your quota", parse_quota
    yield ("lfs", "quota", "-q", "-u", getpass.getuser(), str(mount)), "your Lustre quota", parse_quota
    yield ("lfs", "quota", "-q", "-g", group, str(mount)), "your group's Lustre quota", parse_quota
    if (
        shutil.which("lfs")
        and (match := re.match(r"\s*(\d+)", _output(("lfs", "project", "-d", str(folder)))))
        and int(match[1])
    ):
        yield ("lfs", "quota", "-q", "-p", match[1], str(mount)), f"the quota of Lustre project {match[1]}", parse_quota
    if shutil.which("mmlsquota") and (device := _device(mount)):
        yield ("mmlsquota", "-Y", device), "your GPFS quotas", parse_mmlsquota


def _device(mount: Path) -> str:
    """GPFS's name of the file system that is mounted there; "" where it is none of GPFS."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        device, point, kind, *_ = line.split()
        if point == str(mount) and kind == "gpfs":
            return device.removeprefix("/dev/")
    return ""


def parse_mmlsquota(text: str) -> float | None:
    """GB left, the least of the user's, the groups' and the filesets'; None where there is no
    limit. ``mmlsquota -Y`` prints a line
    of names, then values in KiB between colons."""
    names: list[str] = []
    free_gb = []
    for line in text.splitlines():
        parts = line.split(":")
        if "HEADER" in parts:
            names = parts
            continue
        row = dict(zip(names, parts, strict=False))
        if all(row.get(name, "").isdigit() for name in ("blockUsage", "blockQuota", "blockLimit")):
            limits = [limit for name in ("blockQuota", "blockLimit") if (limit := int(row[name]))]
            free_gb += [(min(limits) - int(row["blockUsage"])) * 1024 / GB] if limits else []
    return min(free_gb) if free_gb else None


def parse_quota(text: str) -> float | None:
    """GB left, from the output of ``quota -w -p`` or ``lfs quota -q``; None where it names no
    limit.

    Both print ``FILESYSTEM blocks quota limit ...`` in KiB, blocks with a star when they are over
    the quota, and 0 for no limit.
    """
    free_gb = []
    for line in text.splitlines():
        match = re.match(r"\s*/?\S*\s+(\d+)\*?\s+(\d+)\s+(\d+)\s", f"{line} ")
        if match:
            used, soft, hard = map(int, match.groups())
            limits = [limit for limit in (soft, hard) if limit]
            free_gb += [(min(limits) - used) * 1024 / GB] if limits else []
    return min(free_gb) if free_gb else None


def check(needs: dict[str, float], folder: Path) -> FreeSpace:
    """The room there is; ConfigError where the stages' checkpoints and models, GB by stage, need
    more than what the run has already."""
    space = free_space(folder)
    total = sum(max(0.0, gb - written_gb(folder / stage)) for stage, gb in needs.items())
    if total > space.free_gb:
        largest = max(needs, key=needs.__getitem__)
        each = ", ".join(f"{stage} {format_gb(gb)}" for stage, gb in needs.items())
        fix = (
            f"--set {largest}.keep_checkpoints=1 and a larger save_every, or "
            if largest in ALL and ALL[largest].trainer
            else ""
        )
        raise ConfigError(
            f"the run would write about {format_gb(total)} (at once: {each}), "
            f"but only {format_gb(space.free_gb)} are {space.where}; "
            f"{fix}another place: --runs FOLDER; or remove old runs"
        )
    return space


def format_gb(gb: float) -> str:
    """In words: "1.5 GB", "20 MB"."""
    return f"{gb:.1f} GB" if gb >= 0.95 else f"{max(0.0, gb) * 1000:.0f} MB"


def written_gb(folder: Path) -> float:
    """What lies below a folder; 0 where it does not exist."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) / GB


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=QUOTA_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
