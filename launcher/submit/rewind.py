"""Taking a stage back: to its beginning, or to one of its checkpoints. What was built from it is
moved away. Nothing is deleted."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.config.stages import Stage
from launcher.run import checkpoints
from launcher.run.folder import Run, iteration_folder, write_text
from launcher.submit.create import write_stage_config
from training.errors import ConfigError

ASIDE = "checkpoints.aside"


def rewind(run: Run, stage: Stage, iteration: int | None) -> list[str]:
    """Make ``stage`` run again: from its beginning, or from ``iteration``. What was built from it
    is moved away.

    Returns what was done, in words. The checkpoint becomes the stage's ``latest`` and newer ones
    are moved to checkpoints.aside, so that a later attempt of the same stage goes on from where it
    is then, not from this iteration once more. The caller has asked ``check_iteration``.
    """
    folder, messages = run.stage(stage.name), []
    run.record("rewound", stage=stage.name, iteration=iteration)
    if iteration is None:
        if has_work(run, stage):
            messages.append(f"{stage.name} starts over; what it had is in {begin_again(run, stage)}")
    else:
        if (folder / "DONE.json").exists():
            run.set_aside(folder / "DONE.json")
        write_text(folder / "latest", f"{iteration}\n")
        newer = [number for number in run.checkpoint_iterations(stage.name) if number > iteration]
        for number in newer:
            put_aside(run, stage.name, number)
        messages.append(
            f"{stage.name} goes on from iteration {iteration}"
            + (f"; newer ones are in {folder / ASIDE}" if newer else "")
        )
    return messages + renew_descendants(run, stage)


def renew_descendants(run: Run, stage: Stage) -> list[str]:
    """What was built from a stage starts over, since that stage is not done any more; what was
    done, in words."""
    return [
        f"{later.name} was made from {stage.name}: it starts over; what it had is in {begin_again(run, later)}"
        for later in descendants(run, stage)
        if has_work(run, later)
    ]


def check_iteration(run: Run, stage: Stage, iteration: int) -> None:
    """ConfigError, with the iterations that there are, unless the stage has this checkpoint
    whole."""
    present = run.checkpoint_iterations(stage.name)
    shown = ", ".join(map(str, present)) or "none"
    if iteration not in present:
        raise ConfigError(
            f"--load-iteration {iteration}: {stage.name} of {run.folder} has no such checkpoint; present: {shown}"
        )
    reason = checkpoints.damage(run.stage(stage.name) / "checkpoints" / iteration_folder(iteration))
    if reason:
        raise ConfigError(f"--load-iteration {iteration}: {reason}; choose another one, present: {shown}")


def begin_again(run: Run, stage: Stage) -> Path:
    """Move a stage's folder aside whole, and give it a new one; returns where the old one is."""
    aside = run.set_aside(run.stage(stage.name))
    run.record("set aside", stage=stage.name, folder=aside.name)
    write_stage_config(run, stage.name)
    return aside


def put_aside(run: Run, stage: str, iteration: int) -> Path:
    """Move one checkpoint to checkpoints.aside."""
    folder = run.stage(stage)
    (folder / ASIDE).mkdir(exist_ok=True)
    target = _free(folder / ASIDE / iteration_folder(iteration))
    os.replace(folder / "checkpoints" / iteration_folder(iteration), target)
    return target


def move_stale_aside(run: Run, todo: list[Stage]) -> None:
    """A stage that has to run although it has a manifest was built from parents that are no more:
    it starts over."""
    for stage in todo:
        if (run.stage(stage.name) / "DONE.json").exists():
            begin_again(run, stage)


def descendants(run: Run, stage: Stage) -> list[Stage]:
    """The stages that read what ``stage`` makes, and what is made from that, in order."""
    names = {stage.name}
    for other in run.stages.values():
        if names & set(other.parents):
            names.add(other.name)
    return [other for other in run.stages.values() if other.name in names and other is not stage]


def has_work(run: Run, stage: Stage) -> bool:
    """Whether a stage was ever started; its folder and config.json are there from the beginning."""
    return (
        run.status(stage.name)["attempt"] > 0
        or run.iteration(stage.name) is not None
        or (run.stage(stage.name) / "DONE.json").exists()
    )


def _free(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"{path.name}.{number}") if number else path).exists():
        number += 1
    return target
