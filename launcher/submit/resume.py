"""Going on with a run. ``examine`` checks all that was asked for and writes nothing; ``carry_out``
then does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.checks import plan_checks
from launcher.run.folder import Run, lock
from launcher.slurm import commands, transaction
from launcher.status import state
from launcher.status.state import RunStatus
from launcher.submit import change, create, prepared, repair, test_only
from launcher.submit.change import Change, Wish
from launcher.submit.rewind import check_iteration, descendants, rewind
from training.errors import ConfigError


@dataclass
class Steps:
    """What ``resume`` will do to one run; it passed every check."""

    run: Run
    change: Change
    iteration: int | None = None
    silent_workers: repair.SilentWorkers | None = None
    """Who is declared dead."""
    events: int = 0
    """Length of the ledger when the run was looked at."""

    @property
    def rewrites(self) -> bool:
        """Whether more is done than starting what is left."""
        return bool(self.change.target or self.change.lines or self.silent_workers)


def take_up(runs: list[Run], wish: Wish, agree: Callable[[list[str]], bool]) -> list[str]:
    """Make the runs ready to go on, and say what was done to them. ``agree`` is asked before a
    configuration changes.

    Nothing is written before all runs have passed all checks. Raises ConfigError where what is
    wished can't be, SlurmError where the queue would have to be asked and does not answer.
    """
    for run in runs:
        run.check_here()
    steps = [examine(look, wish) for look in state.statuses_of(runs)]
    check_slurm(steps)
    changed = [one for one in steps if one.change.lines]
    if changed and not agree(_shown(changed)):
        raise ConfigError("nothing was changed and nothing started")
    for one in steps:
        _prepare(one)
    return [line for one in steps for line in carry_out(one)]


def examine(look: RunStatus, wish: Wish) -> Steps:
    """What ``wish`` means for a run. ConfigError, or SlurmError, for everything that stands
    against it; nothing is written."""
    run, events = look.run, len(look.run.ledger())
    silent_workers = repair.silent_workers(run) if wish.take_over else None
    if look.trouble and not (silent_workers and wish.profile and wish.profile.scheduler != "slurm"):
        _refuse_silence(look, wish)
    steps = Steps(run, change.examine(run, wish), wish.iteration, silent_workers, events)
    if steps.change.target:
        _check_target(steps)
    if not silent_workers:
        if steps.rewrites:
            _check_idle(look)
        repair.check_orphans(look)
    return steps


def carry_out(steps: Steps) -> list[str]:
    """Do what ``examine`` found possible; what was done, in words."""
    run, messages = steps.run, []
    with transaction.patient(lambda: lock(run.folder / ".prepare.lock")):
        if steps.rewrites and len(run.ledger()) != steps.events:
            raise ConfigError(
                f"another command changed {run.folder} meanwhile; nothing was changed by this one: look at it with "
                f"python -m launcher status {run.folder}, then resume again"
            )
        if steps.silent_workers:
            messages += repair.take_over(run, steps.silent_workers)
        messages += change.apply(run, steps.change)
        messages += prepared.prepare(run, keep=True, restarted=_restarted(steps))
        prepared.summarise(run, plan_checks.lengths(run.folder, run.config, run.stages, list(run.stages.values())))
        stop = run.folder / "STOP"
        if stop.exists():
            stop.unlink()
            messages.append("the file STOP was removed")
        if steps.change.target:
            messages += rewind(run, steps.change.target, steps.iteration)
        return messages + repair.heal(run)


def check_slurm(steps: list[Steps]) -> None:
    """Raise SlurmError or ConfigError where a change is to be queued with a Slurm that isn't
    there, or that would refuse it."""
    first = next((one for one in steps if one.rewrites and one.change.profile["scheduler"] == "slurm"), None)
    if first is None:
        return
    if reason := commands.unusable():
        raise commands.SlurmError(f"{reason}: nothing was changed; the same command does it once Slurm answers")
    test_only.expected_starts(_plan(first))


def _plan(steps: Steps) -> create.Plan:
    """The stages that the change makes run, as ``submit`` would plan them."""
    run, config = steps.run, steps.change
    back = {*config.restarted, *config.uncertified, *([config.target.name] if config.target else [])}
    again = {stage for name in back for stage in (run.stages[name], *descendants(run, run.stages[name]))}
    stages = [stage for stage in config.stages if stage in again or stage in change.unfinished(run)]
    return create.Plan(
        run, config.tables, run.config["run"]["recipe"], stages, config.site, "", None, run.config["run"]
    )


def _prepare(steps: Steps) -> None:
    """Prepare the data as the new configuration wants it: bad data is found while nothing else is
    written."""
    with transaction.patient(lambda: lock(steps.run.folder / ".prepare.lock")):
        prepared.prepare(create.Draft(_plan(steps)), keep=True, restarted=_restarted(steps))


def _restarted(steps: Steps) -> set[str]:
    """Stages that will begin from nothing, so that they may read other rows than before."""
    run, target = steps.run, steps.change.target
    first = {*steps.change.restarted, *([target.name] if target and steps.iteration is None else [])}
    return first | {stage.name for name in first for stage in descendants(run, run.stages[name])}


def _check_target(steps: Steps) -> None:
    """ConfigError where the stage can't go back to its iteration, where the change takes that
    away, or where it isn't to run."""
    run, stage, iteration = steps.run, steps.change.target, steps.iteration
    names = [one.name for one in steps.change.stages]
    if stage.name not in names:
        raise ConfigError(
            f"--from {stage.name}: this run is to go until {names[-1]} "
            f"only; add --until {stage.name}, or --all for all stages"
        )
    if iteration is None:
        return
    check_iteration(run, stage, iteration)
    over = [name for name in steps.change.restarted if stage in (run.stages[name], *descendants(run, run.stages[name]))]
    if over:
        raise ConfigError(
            f"--load-iteration {iteration}: with the changed values {over[0]} starts over, so this checkpoint of "
            f"{stage.name} is of another configuration; leave out --load-iteration, or what changes {over[0]}"
        )
    if stage.trainer and iteration > (last := steps.change.tables[stage.name]["iterations"]):
        raise ConfigError(
            f"--load-iteration {iteration}: {stage.name} ends at iterations = {last}; raise it: "
            f"--set {stage.name}.iterations=N"
        )


def _check_idle(look: RunStatus) -> None:
    run, busy = look.run, [row.stage for row in look.stages if row.state in state.ACTIVE]
    if busy:
        raise ConfigError(
            f"{', '.join(busy)} of {run.folder} is running or queued; "
            f"stop it first: python -m launcher cancel {run.folder}"
        )


def _refuse_silence(look: RunStatus, wish: Wish) -> None:
    """Raise for a Slurm that doesn't answer, with the way on without it."""
    run, busy = look.run, [row.stage for row in look.stages if row.state in state.ACTIVE]
    if busy and (wish.first or wish.iteration is not None or wish.profile or wish.sets or wish.files):
        raise ConfigError(
            f"{', '.join(busy)} of {run.folder} was queued with Slurm, which does not answer ({look.trouble}); "
            "if its jobs are gone for good add --take-over, and --profile local to go on without it"
        )
    raise commands.SlurmError(
        f"{look.trouble}; to go on without that cluster, once its jobs are gone for good: "
        f"python -m launcher resume {run.folder} --profile local --take-over"
    )


def _shown(steps: list[Steps]) -> list[str]:
    """The changes, once for all runs of a sweep that share them."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in steps:
        groups.setdefault(tuple(one.change.lines), []).append(str(one.run.folder))
    if len(groups) == 1:
        return list(next(iter(groups)))
    return [
        line
        for lines, folders in groups.items()
        for line in (f"{', '.join(folders)}:", *(f"  {text}" for text in lines))
    ]
