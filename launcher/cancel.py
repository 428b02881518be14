"""Stop everything of a run: its local runner, its jobs, and the retry that one of them may be about to queue."""

from __future__ import annotations

import contextlib
import time

from launcher import jobs, local, probe, sbatch, state
from launcher.run import Failed, Run, is_alive

CANCEL_S = 90
"""Seconds that Slurm gets to end cancelled jobs (its KillWait, 30 s by default, and some)."""
AGAIN_S = 2
"""A job that is still there after so long is told once more: it may have queued itself again in between."""


def cancel(run: Run) -> str:
    """Stop the run, wait until nothing of it is left, and say in words what it was.

    Raises ConfigError where its runner is on another host, SlurmError where the controller does not answer (then nothing of
    Slurm's was stopped), Failed where Slurm does not end a job in CANCEL_S.
    """
    before = {row.stage: row for row in state.look(run).stages}
    said = []
    if runner := run.runner():
        local.cancel(run)
        said.append(f"the local runner (process {runner['pid']})")
    said += _lone_supervisors(run)
    if run.uses_slurm():
        said += _jobs(run, before)
    working = [words(before[name]) for name in run.stages if before[name].state in state.ACTIVE]
    if not said:
        return "nothing is running or queued"
    left = [row.stage for row in state.look(run).stages if row.state in state.ACTIVE]
    if left:
        raise Failed(f"stopped {', '.join(said)}, but {', '.join(left)} of {run.folder} is running or queued again; cancel once more")
    return "\n".join([f"stopped {', '.join(said)}", *(f"  {line}" for line in working),
                      f"goes on from the last checkpoints: python -m launcher resume {run.folder}"])


def words(row: state.StageState) -> str:
    """What a stage was doing, for the one who stopped it."""
    far = row.progress
    at = f" at iteration {far.iteration} of {far.total}" if far.iteration is not None else ""
    kept = f", last checkpoint {far.saved}" if far.saved is not None else ""
    return f"{row.stage} was {row.state}{at}{kept}" + (f" ({row.why})" if row.why else "")


def _lone_supervisors(run: Run) -> list[str]:
    """Stop supervisors that were started by hand, without a runner or a job."""
    said = []
    for name in run.stages:
        status = run.status(name)
        if status["state"] == "running" and status["job"] is None and local.here(status) and is_alive(status):
            local.end(status)
            said.append(f"the supervisor of {name} (process {status['pid']})")
    return said


def _jobs(run: Run, before: dict[str, state.StageState]) -> list[str]:
    """scancel until neither the queue nor a job about to queue itself again is left."""
    try:
        alive = found = _alive(run)
    except probe.SlurmError as error:
        waiting = [name for name, row in before.items() if row.state in state.ACTIVE]
        if not waiting:
            return []
        raise probe.SlurmError(f"{error}; the jobs of {', '.join(waiting)} could not be cancelled. Without Slurm, what runs can be told to "
                               f"save and end, and what waits not to start: touch {run.folder / 'STOP'}") from None
    if not alive:
        return []
    run.record("cancelled", jobs={name: job.id for name, job in alive.items()})
    deadline, told = time.monotonic() + CANCEL_S, 0.0
    while alive:
        found = {**alive, **found}
        if time.monotonic() > told + AGAIN_S:
            with contextlib.suppress(probe.SlurmError):  # one of them may have ended by itself
                sbatch.cancel([job.handle for job in alive.values()])
            told = time.monotonic()
        if time.monotonic() > deadline:
            raise Failed(f"Slurm has not ended {', '.join(job.handle for job in alive.values())} within {CANCEL_S} s of scancel; "
                         "squeue shows why")
        time.sleep(0.1)
        alive = _alive(run) or _coming_back(run)
    return [f"job {job.handle} ({name})" for name, job in sorted(found.items(), key=lambda pair: pair[1].id)]


def _alive(run: Run) -> dict[str, jobs.Job]:
    gone = run.disowned()
    return {name: job for name, job in jobs.of_run(run).items() if job.alive and job.id not in gone}


def _coming_back(run: Run) -> dict[str, jobs.Job]:
    """Jobs that queued themselves again between two looks: a second look after a moment."""
    time.sleep(0.5)
    return _alive(run)
