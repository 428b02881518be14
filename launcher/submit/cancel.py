"""Stop everything of runs: their local runners, their jobs, and the retry that one of them may be
about to queue."""

from __future__ import annotations

import contextlib
import time

from launcher.run.folder import Failed, Run, is_alive
from launcher.slurm import commands, script
from launcher.slurm import queue as jobs
from launcher.slurm.polling import Queue, pauses
from launcher.status import state
from launcher.status.row import before_cancel
from launcher.submit import local
from training.errors import ConfigError

CANCEL_S = 90
"""Seconds that Slurm gets to end cancelled jobs (its KillWait, 30 s by default, and some)."""
AGAIN_S = 2
"""A job that is still pending or running after so long is told once more: it may have queued
itself again in between."""
PAUSES_S = (1, 16)
"""Seconds between questions to the queue meanwhile: the first, and the longest."""
LOOK_S = 0.5
"""Seconds between looks at the files: where all stages have said their last word, the queue is
asked at once."""

Jobs = dict[tuple[Run, str], jobs.Job]
"""(run, stage) -> its live job."""


def cancel(runs: list[Run]) -> dict[Run, str]:
    """Stop the runs, wait until nothing of them is left, and say in words what each was.

    Raises ConfigError where a runner is on another host (then nothing was stopped), SlurmError
    where the controller does not answer (then nothing of Slurm's was stopped), Failed where Slurm
    does not end a job in CANCEL_S.
    """
    for run in runs:
        if (runner := run.runner()) and not local.here(runner):
            raise ConfigError(local.elsewhere(run, runner))
    queue = Queue()
    before = {one.run: one for one in state.statuses_of(runs, queue)}
    stopped: dict[Run, list[str]] = {run: [] for run in runs}
    for run in runs:
        if runner := run.runner():
            local.cancel(run)
            stopped[run].append(f"the local runner (process {runner['pid']})")
        stopped[run] += _lone_supervisors(run)
    for run, texts in _jobs(before, queue).items():
        stopped[run] += texts
    if left := [str(run.folder) for run in runs if stopped[run] and run.runner()]:
        raise Failed(
            f"stopped {', '.join(text for texts in stopped.values() for text in texts)}, but a local runner works on "
            f"{', '.join(left)} again; cancel once more"
        )
    return {run: _summary(run, stopped[run], before[run]) for run in runs}


def _summary(run: Run, stopped: list[str], before: state.RunStatus) -> str:
    if not stopped:
        return "nothing is running or queued"
    working = [f"  {before_cancel(row)}" for row in before.stages if row.state in state.ACTIVE]
    return "\n".join(
        [
            f"stopped {', '.join(stopped)}",
            *working,
            f"goes on from the last checkpoints: python -m launcher resume {run.folder}",
        ]
    )


def _lone_supervisors(run: Run) -> list[str]:
    """Stop supervisors that were started by hand, without a runner or a job."""
    stopped = []
    for name in run.stages:
        status = run.status(name)
        if status["state"] == "running" and status["job"] is None and local.here(status) and is_alive(status):
            local.end(status)
            stopped.append(f"the supervisor of {name} (process {status['pid']})")
    return stopped


def _jobs(before: dict[Run, state.RunStatus], queue: Queue) -> dict[Run, list[str]]:
    """scancel until neither the queue nor a job about to queue itself again is left."""
    runs = [run for run in before if run.uses_slurm()]
    if queue.trouble:
        active = {run: [row.stage for row in before[run].stages if row.state in state.ACTIVE] for run in runs}
        waiting = [
            ", ".join(stages) + (f" of {run.folder}" if len(runs) > 1 else "")
            for run, stages in active.items()
            if stages
        ]
        if not waiting:
            return {}
        stops = " ".join(str(run.folder / "STOP") for run in runs)
        raise commands.SlurmError(
            f"{queue.trouble}; the jobs of {', '.join(waiting)} could not be cancelled. Without Slurm, what runs can "
            f"be told to save and end, and what waits not to start: touch {stops}"
        )
    alive = _alive(runs, queue.jobs)
    if not alive:
        return {}
    every = alive
    for run in {run: None for run, _ in alive}:
        run.record("cancelled", jobs={stage: job.id for (one, stage), job in alive.items() if one is run})
    _insist(alive)
    deadline, last_scancel, quiet_looks, waits = time.monotonic() + CANCEL_S, time.monotonic(), 0, pauses(*PAUSES_S)
    while quiet_looks < 2:  # a job may be queueing itself again between two looks
        _wait(next(waits) if alive else PAUSES_S[0], alive)
        alive = _alive(runs, jobs.of_runs(runs, ping=False))
        quiet_looks = 0 if alive else quiet_looks + 1
        every = {**alive, **every}
        moving = {key: job for key, job in alive.items() if job.pending or job.state == "RUNNING"}
        if moving and time.monotonic() > last_scancel + AGAIN_S:
            _insist(moving)
            last_scancel = time.monotonic()
        if alive and time.monotonic() > deadline:
            raise Failed(
                f"Slurm has not ended {', '.join(job.handle for job in alive.values())} "
                f"within {CANCEL_S} s of scancel; squeue shows why"
            )
    return {
        run: [
            f"job {job.handle} ({stage})"
            for (one, stage), job in sorted(every.items(), key=lambda pair: pair[1].id)
            if one is run
        ]
        for run in runs
    }


def _insist(alive: Jobs) -> None:
    """scancel them: of a sweep that is cancelled whole its arrays, not each element."""
    if alive:
        every = len({run for run, _ in alive}) > 1
        with contextlib.suppress(commands.SlurmError):  # one of them may have ended by itself
            script.cancel(sorted({job.handle.partition("_")[0] if every else job.handle for job in alive.values()}))


def _wait(seconds: float, alive: Jobs) -> None:
    """Rest so long, or until the stages' files tell that all have ended: Slurm then needs a
    moment."""
    ending = time.monotonic() + seconds
    running = [key for key, job in alive.items() if not job.pending]
    while (now := time.monotonic()) < ending:
        time.sleep(min(LOOK_S, ending - now))
        if running and all(run.status(stage)["state"] != "running" for run, stage in running):
            time.sleep(LOOK_S)
            return


def _alive(runs: list[Run], known: dict[str, dict[str, jobs.Job]]) -> Jobs:
    disowned = {run: run.disowned() for run in runs}
    return {
        (run, stage): job
        for run in runs
        for stage, job in known.get(run.id, {}).items()
        if job.alive and job.id not in disowned[run]
    }
