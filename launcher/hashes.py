"""The hashes that a checkpoint carries: is an iteration's folder still what its ranks saved?"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path

from launcher.run import Run, iteration_folder

NAME = "SHA256"
"""File of an iteration's folder, as sha256sum(1) writes it: ``<64 hex>  <path below the folder>``, one line a file."""
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(paths: Collection[Path]) -> dict[Path, str]:
    """sha256 of each file; reading and hashing release Python's lock, so threads add up."""
    from concurrent.futures import ThreadPoolExecutor  # late: status needs this file, not this

    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


def damage(folder: Path) -> str:
    """What is wrong with an iteration's folder, in words; "" when it is whole, or has no hashes to tell by. Reads every byte."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return f"{folder} is missing or empty"
    path = folder / NAME
    if not path.is_file():
        return ""  # saved by an older Convoy
    listed = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = LINE.fullmatch(text)
        if line is None:
            return f"{path} is damaged: {text[:80]!r} is not a line of sha256sum"
        listed[folder / line[2]] = line[1]
    if not listed:
        return f"{path} is empty"
    if missing := [saved for saved in listed if not saved.is_file()]:
        return f"{missing[0]} is missing"
    for saved, found in sha256_of(listed).items():
        if found != listed[saved]:
            return f"{saved} does not have the sha256 with which it was saved: truncated, or its content changed"
    return ""


def newest_intact(run: Run, stage: str) -> tuple[int | None, dict[int, str]]:
    """The newest iteration, at most ``latest``, that is whole (None without one), and those above it with what is wrong with them."""
    latest, bad = run.iteration(stage), {}
    if latest is None:
        return None, bad
    for number in sorted({latest, *(n for n in run.checkpoint_iterations(stage) if n < latest)}, reverse=True):
        reason = damage(run.stage(stage) / "checkpoints" / iteration_folder(number))
        if not reason:
            return number, bad
        bad[number] = reason
    return None, bad
