"""Going on with a run: check that it can, change its configuration, take a stage back, move aside what was made from what is no more."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher import checks, hashes, heal, jobs, manifest, probe, state, submission
from launcher.config import Profile, check_sections, differences, merge, parse_set, read_toml
from launcher.heal import begin_again
from launcher.pipeline import Stage, full_tables, sections, stage_config
from launcher.run import Run, iteration_folder, lock, write_json, write_text
from launcher.submit import prepare, write_stage_config
from training.settings import ConfigError

ASIDE = "checkpoints.aside"


@dataclass(frozen=True)
class Wish:
    """What ``resume`` was asked for."""

    first: str | None = None
    """Stage that begins anew, or at ``iteration``; and all that was built from it."""
    iteration: int | None = None
    """Saved iteration to go on from; of ``first``, else of the first stage that is not done."""
    files: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    profile: Profile | None = None
    take_over: bool = False


@dataclass
class Change:
    """A new configuration of a run and what follows from it."""

    tables: dict
    profile: dict
    lines: list[str] = field(default_factory=list)
    """The keys that differ, then what happens."""
    anew: list[str] = field(default_factory=list)
    """Stages that begin anew, with all that was built from them."""
    uncertified: list[str] = field(default_factory=list)
    """Stages that are not done any more but keep what they have."""


def take_up(run: Run, wish: Wish, agree: Callable[[list[str]], bool]) -> list[str]:
    """Make the run ready to go on, and say what was done to it. ``agree`` is asked before its configuration changes.

    Raises ConfigError where what is wished can't be, SlurmError where the queue would have to be asked and does not answer.
    """
    run.check_here()
    said = heal.take_over(run) if wish.take_over else []
    change = _change(run, wish)
    if wish.first or wish.iteration is not None or change.lines:
        _check_idle(run)
    elif run.uses_slurm():
        _check_slurm(run)
    if change.lines and not agree(change.lines):
        raise ConfigError("nothing was changed and nothing started")
    with submission.patient(lambda: lock(run.folder / ".prepare.lock")):
        if change.lines:
            _apply(run, change)
        prepare(run)
        stop = run.folder / "STOP"
        if stop.exists():
            stop.unlink()
            said.append("the file STOP was removed")
        if wish.first or wish.iteration is not None:
            said += rewind(run, _chosen(run, wish), wish.iteration)
        return said + heal.heal(run)


def rewind(run: Run, stage: Stage, iteration: int | None) -> list[str]:
    """Make ``stage`` run again: anew, or from ``iteration``; what was built from it is moved aside whole. Returns what was done, in words.

    The checkpoint becomes the stage's ``latest`` and newer ones are moved to checkpoints.aside, so that a later attempt of
    the same stage goes on from where it is then, not from this iteration once more.
    """
    folder, said = run.stage(stage.name), []
    if iteration is not None:
        _check_iteration(run, stage, iteration)
    run.record("rewound", stage=stage.name, iteration=iteration)
    if iteration is None:
        if _has_work(run, stage):
            said.append(f"{stage.name} begins anew; what it had is in {begin_again(run, stage)}")
    else:
        if (folder / "DONE.json").exists():
            run.set_aside(folder / "DONE.json")
        write_text(folder / "latest", f"{iteration}\n")
        newer = [number for number in run.checkpoint_iterations(stage.name) if number > iteration]
        for number in newer:
            put_aside(run, stage.name, number)
        said.append(f"{stage.name} goes on from iteration {iteration}" + (f"; newer ones are in {folder / ASIDE}" if newer else ""))
    for later in descendants(run, stage):
        if _has_work(run, later):
            said.append(f"{later.name} was made from it: it begins anew; what it had is in {begin_again(run, later)}")
    return said


def put_aside(run: Run, stage: str, iteration: int) -> Path:
    """Move one checkpoint to checkpoints.aside; nothing is deleted."""
    folder = run.stage(stage)
    (folder / ASIDE).mkdir(exist_ok=True)
    target = _free(folder / ASIDE / iteration_folder(iteration))
    os.replace(folder / "checkpoints" / iteration_folder(iteration), target)
    return target


def move_stale_aside(run: Run, todo: list[Stage]) -> None:
    """A stage that has to run although it has a manifest was built from parents that are no more: it begins anew."""
    for stage in todo:
        if (run.stage(stage.name) / "DONE.json").exists():
            begin_again(run, stage)


def descendants(run: Run, stage: Stage) -> list[Stage]:
    found = {stage.name}
    for other in run.stages.values():
        if found & set(other.parents):
            found.add(other.name)
    return [other for other in run.stages.values() if other.name in found and other is not stage]


def _chosen(run: Run, wish: Wish) -> Stage:
    left = manifest.left(run, list(run.stages.values()))
    if wish.first is None and not left:
        raise ConfigError(f"--load-iteration {wish.iteration} of which stage? all are done; add --from, one of {', '.join(run.stages)}")
    return run.stage_named(wish.first) if wish.first else left[0]


def _check_iteration(run: Run, stage: Stage, iteration: int) -> None:
    present = run.checkpoint_iterations(stage.name)
    shown = ", ".join(map(str, present)) or "none"
    if iteration not in present:
        raise ConfigError(f"--load-iteration {iteration}: {stage.name} of {run.folder} has no such checkpoint; present: {shown}")
    reason = hashes.damage(run.stage(stage.name) / "checkpoints" / iteration_folder(iteration))
    if reason:
        raise ConfigError(f"--load-iteration {iteration}: {reason}; choose another one, present: {shown}")


def _check_idle(run: Run) -> None:
    seen = state.look(run)
    busy = [row.stage for row in seen.stages if row.state in state.ACTIVE]
    if busy and seen.trouble:
        raise ConfigError(f"{', '.join(busy)} of {run.folder} was queued with Slurm, which does not answer ({seen.trouble}); if its jobs "
                          "are gone for good add --take-over, and --profile local to go on without it")
    if busy:
        raise ConfigError(f"{', '.join(busy)} of {run.folder} is running or queued; stop it first: python -m launcher cancel {run.folder}")


def _check_slurm(run: Run) -> None:
    try:
        jobs.of_run(run)
    except probe.SlurmError as error:
        raise probe.SlurmError(f"{error}; to go on without that cluster, once its jobs are gone for good: "
                               f"python -m launcher resume {run.folder} --profile local --take-over") from None


def _change(run: Run, wish: Wish) -> Change:
    """The configuration that is wished for, checked, beside the present one; its ``lines`` are empty where nothing differs."""
    config = run.config
    layers = [(read_toml(path), str(path)) for path in wish.files] + [(parse_set(text), f"--set {text}") for text in wish.sets]
    for tables, where in layers:
        check_sections(tables, where)
    old = {section: config[section] for section in sections(run.stages)}
    profile = config["profile"] if wish.profile is None else dataclasses.asdict(wish.profile)
    change = Change(full_tables(run.folder, merge(old, *(tables for tables, _ in layers)), run.stages), profile)
    keys = differences(old, change.tables) + differences({"profile": config["profile"]}, {"profile": profile})
    if not keys:
        return change
    checks.check(run.folder, change.tables, run.stages, manifest.left(run, list(run.stages.values())), Profile(**profile))
    change.lines = [*keys, *_consequences(run, old, change, wish)]
    return change


def _consequences(run: Run, old: dict, change: Change, wish: Wish) -> list[str]:
    """What each stage makes of the change, in words; fills ``anew`` and ``uncertified``."""
    lines = []
    for name, stage in run.stages.items():
        before, after = (dataclasses.asdict(stage_config(run.folder, tables, run.stages, name)) for tables in (old, change.tables))
        if before == after or not _has_work(run, stage) or any(stage in descendants(run, run.stages[other]) for other in change.anew):
            continue
        at, only = run.iteration(name), {key for key in after if before[key] != after[key]}
        chosen = wish.first == name and wish.iteration is not None
        longer = stage.trainer and only <= {"iterations"} and (at or 0) < after["iterations"]
        if name == "mtbench" or chosen or longer or (stage.trainer and not (run.stage(name) / "DONE.json").exists()):
            change.uncertified.append(name)
            where = f"iteration {wish.iteration if chosen else at}" if stage.trainer else "what it has"
            lines.append(f"=> {name} goes on from {where}, with the new values")
        else:
            change.anew.append(name)
            later = [each.name for each in descendants(run, stage) if _has_work(run, each)]
            lines.append(f"=> {name} begins anew" + (f", and so does what was made from it: {', '.join(later)}" if later else "") +
                         "; what they had is kept aside")
    return lines or ["=> the stages that are left run with it"]


def _apply(run: Run, change: Change) -> None:
    config = run.config
    write_json(run.config_file, {**config, "run": {**config["run"], "profile": change.profile["name"]}, "profile": change.profile,
                                 **change.tables})
    run.record("changed", lines=change.lines)
    for name in change.anew:
        rewind(run, run.stages[name], None)
    for name in run.stages:
        write_stage_config(run, name)
        done = run.stage(name) / "DONE.json"
        if name in change.uncertified and done.exists():
            run.record("rewound", stage=name, iteration=run.iteration(name))
            run.set_aside(done)


def _has_work(run: Run, stage: Stage) -> bool:
    """Whether a stage was ever started; its folder and config.json are there from the beginning."""
    return run.status(stage.name)["attempt"] > 0 or run.iteration(stage.name) is not None or (run.stage(stage.name) / "DONE.json").exists()


def _free(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"{path.name}.{number}") if number else path).exists():
        number += 1
    return target
