"""What a job finds in its stage's folder: how far the stage is, and damaged checkpoints."""

from __future__ import annotations

import contextlib
import os

from launcher.config.stages import Stage
from launcher.run import checkpoints
from launcher.run.folder import Run, iteration_folder, write_text

NOT_PROGRESS = (
    "config.json",
    "status.json",
    "metrics.jsonl",
    "verified.json",
    "latest",
    "SHA256",
    ".attempt",
    ".reserve",
    ".lock",
)
"""Files of a stage that do not show how far it is."""


def work_done(run: Run, stage: Stage) -> int:
    """How far a stage is: the iteration of a trainer's last checkpoint; for other stages the bytes
    that they have finished."""
    if stage.trainer:
        return run.iteration(stage.name) or 0
    total = 0
    for folder, folders, names in os.walk(run.stage(stage.name)):
        folders[:] = [name for name in folders if name not in ("logs", "preflight")]
        for name in names:
            if name in NOT_PROGRESS or name.endswith((".part", ".tmp", ".new", ".lock")):
                continue
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def quarantine_damaged(run: Run, stage: Stage) -> dict[int, str]:
    """Move checkpoints that are damaged to checkpoints.aside, and make the newest intact one
    ``latest``. Nothing is deleted. Returns iteration -> what is wrong with it."""
    intact, damaged = checkpoints.newest_intact(run, stage.name) if stage.trainer else (None, {})
    if not damaged:
        return {}
    folder = run.stage(stage.name)
    quarantine = folder / "checkpoints.aside"
    quarantine.mkdir(exist_ok=True)
    if intact is None:
        (folder / "latest").unlink()
    else:
        write_text(folder / "latest", f"{intact}\n")
    for iteration, reason in damaged.items():
        source, number = folder / "checkpoints" / iteration_folder(iteration), 0
        while (target := quarantine / f"{source.name}{f'.{number}' if number else ''}").exists():
            number += 1
        if source.exists():
            os.replace(source, target)
        run.record("bad checkpoint", stage=stage.name, iteration=iteration, reason=reason)
    return damaged
