"""Mend what a crash, a lost file or a vanished host left of a run, so that it can go on; and say
what was mended."""

from __future__ import annotations

import contextlib
import getpass
import os
import time
from dataclasses import dataclass

from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Busy, Run, lock
from launcher.run.manifest import Refused
from launcher.slurm import commands, queue
from launcher.status import state
from launcher.submit import local
from launcher.submit.rewind import begin_again
from training.errors import ConfigError

ALIVE_S = 60
"""A run that was written to within so many seconds is taken to be worked on."""
ORPHAN_S = 10
"""Seconds that processes get to end when the queue has just forgotten their job."""


def heal(run: Run) -> list[str]:
    """Mend markers and manifests; what was done, in words. The caller has asked ``check_orphans``.

    A damaged checkpoint is left to the stage's supervisor: it goes on from the newest whole one.
    """
    messages = []
    for stage in run.stages.values():
        messages += _unreadable(run, stage) or _lost_manifest(run, stage)
    return messages + _refused_parents(run)


def check_orphans(seen: state.RunStatus) -> None:
    """ConfigError where processes of a job that the controller has forgotten still work: two
    supervisors must not write to one stage."""
    run = seen.run
    for row in seen.stages:
        status = run.status(row.stage)
        if row.state != "failed" or status["state"] != "running":
            continue
        deadline = time.monotonic() + ORPHAN_S
        while _is_locked(run, row.stage):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Slurm has forgotten job {status['job']}, but its processes still work on {row.stage} "
                    f"of {run.folder} (supervisor: process {status['pid']} on {status['host']}); let them "
                    f"end, or end them there: kill {status['pid']}; then resume again"
                )
            time.sleep(0.1)


@dataclass(frozen=True)
class SilentWorkers:
    """Who worked on a run and is to be declared dead."""

    runner: dict | None
    """A local runner on a host that can't be asked."""
    jobs: dict[str, int]
    """Stage -> Slurm job of a cluster that does not answer."""

    def __str__(self) -> str:
        who = [f"process {self.runner['pid']} on {self.runner['host']}"] if self.runner else []
        return ", ".join([*who, *(f"job {job} ({stage})" for stage, job in self.jobs.items())])


def silent_workers(run: Run) -> SilentWorkers | None:
    """Who ``take_over`` would declare dead, None where there is no such one; ConfigError where
    they can be seen alive."""
    runner = run.runner()
    if runner and local.here(runner):
        raise ConfigError(
            f"--take-over: process {runner['pid']} on this host works on {run.folder}; stop it: "
            f"python -m launcher cancel {run.folder}"
        )
    dead = _silent_jobs(run) if run.uses_slurm() else {}
    if not runner and not dead:
        return None
    quiet = time.time() - _last_write(run)
    if quiet < ALIVE_S:
        raise ConfigError(
            f"--take-over: {run.folder} was written to {quiet:.0f} s ago: who works on it is alive; if you are sure "
            f"that it is not, try again in {ALIVE_S} s"
        )
    return SilentWorkers(runner, dead)


def take_over(run: Run, who: SilentWorkers) -> list[str]:
    """Declare them dead. Should one of these jobs start after all, its supervisor ends it at
    once."""
    runner = who.runner
    run.record(
        "taken over",
        host=runner and runner["host"],
        pid=runner and runner["pid"],
        jobs=list(who.jobs.values()),
        by=getpass.getuser(),
    )
    for name in run.stages:
        if run.status(name)["state"] in ("running", "requeued"):
            run.write_status(
                name,
                state="failed",
                cause=f"declared dead by resume --take-over: {who}",
                ended=time.time(),
                **{"class": "node failure"},
            )
        for path in (run.stage(name) / ".lock", run.folder / ".lock"):
            # a file server may hold a dead host's lock for long
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, path.with_name(".lock.taken"))
    return [f"taken over from {who}"]


def _silent_jobs(run: Run) -> dict[str, int]:
    """Stage -> last job of each stage that may be with Slurm, where Slurm does not answer;
    ConfigError where it shows live ones."""
    try:
        alive = {name: job for name, job in queue.of_run(run).items() if job.alive}
    except commands.SlurmError:
        events = [event for event in run.ledger() if event["event"] == "submitted"]
        disowned = run.disowned()
        return {
            event["stage"]: event["job"]
            for event in events
            if event["job"] not in disowned and not _is_done(run, event["stage"])
        }
    if alive:
        raise ConfigError(
            "--take-over: Slurm answers and has "
            f"{', '.join(f'job {job.handle} ({name})' for name, job in alive.items())}; "
            f"stop them: python -m launcher cancel {run.folder}"
        )
    return {}


def _last_write(run: Run) -> float:
    """When a stage that is not done wrote last."""
    paths = [
        path
        for name in run.stages
        if not _is_done(run, name)
        for path in (
            run.stage(name) / "metrics.jsonl",
            run.stage(name) / "latest",
            *(run.stage(name) / "logs").glob("*"),
        )
    ]
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def _is_done(run: Run, stage: str) -> bool:
    return (run.stage(stage) / "DONE.json").exists()


def _is_locked(run: Run, stage: str) -> bool:
    try:
        with lock(run.stage(stage) / ".lock"):
            return False
    except Busy:
        return True


def _unreadable(run: Run, stage: Stage) -> list[str]:
    """A DONE.json that is no JSON is none."""
    if not _is_done(run, stage.name):
        return []
    try:
        manifest.read(run, stage.name)
    except Refused:
        aside = run.set_aside(run.stage(stage.name) / "DONE.json")
        return [f"{stage.name}: DONE.json was damaged and is now {aside.name}", *_lost_manifest(run, stage)]
    return []


def _lost_manifest(run: Run, stage: Stage) -> list[str]:
    """A stage that was done and whose outputs are whole gets its DONE.json again, so that what was
    made from it stays valid."""
    last = state.RunRecords(run).last_event(stage.name)
    if _is_done(run, stage.name) or last is None or last["event"] != "done":
        return []
    try:
        rebuilt = manifest.make(run, stage, last["attempt"], run.status(stage.name).get("started") or last["time"])
    except Refused as reason:
        return [f"{stage.name}: DONE.json was lost and can't be made again: {reason}"]
    manifest.write(run, stage, rebuilt)
    run.record("healed", stage=stage.name, what="DONE.json")
    return [f"{stage.name}: DONE.json was lost; its outputs are whole, it was made again"]


def _refused_parents(run: Run) -> list[str]:
    """A child that refused to start from a parent's outputs: the parent is not done any more if
    they are still not what they were."""
    messages = []
    for stage in manifest.left(run, list(run.stages.values())):
        if run.status(stage.name).get("class") != "refused":
            continue
        for parent in stage.parents:
            if not _is_done(run, parent):
                continue
            try:
                manifest.verify(run, run.stages[parent])
            except Refused as reason:
                if run.stages[parent].trainer:  # it goes on from its newest whole checkpoint
                    run.record("rewound", stage=parent, iteration=run.iteration(parent))
                    run.set_aside(run.stage(parent) / "DONE.json")
                else:
                    begin_again(run, run.stages[parent])
                messages.append(f"{parent} runs again: {reason}")
    return messages
