"""Is a checkpoint still what its ranks saved? Asked with the checksums that it carries
(training/checkpoint/checksums.py)."""

from __future__ import annotations

from pathlib import Path

from launcher.run.folder import Run, iteration_folder
from training.checkpoint.checksums import NAME, check
from training.errors import Damaged


def damage(folder: Path) -> str:
    """What is wrong with an iteration's folder, in words; "" when it is whole, or has no checksums
    to tell by. Reads every byte."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return f"{folder} is missing or empty"
    if not (folder / NAME).is_file():
        return ""  # saved by an older Convoy
    try:
        check(folder)
    except Damaged as error:
        return error.what
    return ""


def newest_intact(run: Run, stage: str) -> tuple[int | None, dict[int, str]]:
    """The newest iteration, at most ``latest``, that is whole (None without one), and those above
    it with what is wrong with them."""
    latest, bad = run.iteration(stage), {}
    if latest is None:
        return None, bad
    for number in sorted({latest, *(n for n in run.checkpoint_iterations(stage) if n < latest)}, reverse=True):
        reason = damage(run.stage(stage) / "checkpoints" / iteration_folder(number))
        if not reason:
            return number, bad
        bad[number] = reason
    return None, bad
