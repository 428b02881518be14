"""Start what is left of a run, here or with Slurm, wait for it, stop it."""

from __future__ import annotations

import time

from launcher import local, manifest, probe, sbatch
from launcher.config import Profile, build_plain
from launcher.pipeline import STAGES, Stage
from launcher.run import Run
from launcher.submit import Failed, descendants, move_stale_aside
from launcher.view import Watch, console, failures

CANCEL_S = 90
"""Seconds that Slurm gets to end cancelled jobs (its KillWait, 30 s by default, and some)."""


def start(run: Run, stages: list[Stage], wait: bool) -> int:
    """Run or queue those of ``stages`` that are not done; the exit code of the command: with ``wait`` 1 when one failed."""
    out, names = console(), [stage.name for stage in stages]
    slurm = run.config["profile"]["scheduler"] == "slurm"
    if not manifest.left(run, stages):
        out.print(f"{run.folder}: {', '.join(names)} done: nothing left to do")
        return 0
    worker = other_worker(run, slurm)
    if worker:
        out.print(f"{run.folder} is being worked on by {worker}: nothing new is started")
    elif slurm:
        made = queue(run, stages)
        said = ", ".join(f"{stage} {job}" for stage, job in made.items())
        out.print(f"queued: {said}" if made else "everything that is left is queued already")
    elif wait:
        return run_here(run, stages)
    else:
        move_stale_aside(run, todo := manifest.left(run, stages))
        out.print(f"started in the background: process {local.start_in_background(run, todo)}")
    if wait:
        code = wait_for(run, names)
        return start(run, stages, wait) if code == IDLE else code  # the other worker had less to do
    out.print(f"python -m launcher status {run.folder} shows it, cancel stops it")
    return 0


IDLE = -1
"""wait_for's answer where stages are left that nobody works on."""


def other_worker(run: Run, slurm: bool) -> str:
    """Who else works on the run, in words, so that nothing must be started: a local runner, or Slurm jobs when it is to run here."""
    if runner := run.runner():
        return f"a local runner (process {runner['pid']} on {runner['host']})"
    if not slurm and run.uses_slurm():
        return ", ".join(f"Slurm job {job.id} ({stage})" for stage, job in probe.jobs(run.id).items() if job.alive)
    return ""


def run_here(run: Run, stages: list[Stage]) -> int:
    """The local profile in the foreground."""
    todo = manifest.left(run, stages)
    move_stale_aside(run, todo)
    names = [stage.name for stage in todo]
    watch = Watch(run, names, console(), 0.5)
    try:
        with watch.shown():
            code = local.run_stages(run, todo, watch.tick)
            watch.tick(force=True)
    except KeyboardInterrupt:
        watch.out.print(f"stopped; goes on from its last checkpoint with: python -m launcher resume {run.folder}")
        return 130
    return report_end(run, names, "failed" if code else "done")


def wait_for(run: Run, names: list[str]) -> int:
    """Watch a run that others work on until it is done or a stage has failed; Ctrl-C leaves it running."""
    watch = Watch(run, names, console(), 1.0)
    try:
        with watch.shown():
            while (overall := watch.tick()) in ("", "running"):
                time.sleep(0.2)
    except KeyboardInterrupt:
        watch.out.print(f"not waiting any longer; it goes on. stop it: python -m launcher cancel {run.folder}")
        return 130
    return IDLE if overall == "idle" else report_end(run, names, overall)


def report_end(run: Run, names: list[str], overall: str) -> int:
    out = console()
    if overall == "done":
        report = f"; report: {run.folder / 'report.html'}" if "mtbench" in names else ""
        out.print(f"{run.folder}: {', '.join(names)} done{report}")
        return 0
    for line in failures(run, names):
        out.print(line, markup=False)
    return 1


def queue(run: Run, stages: list[Stage]) -> dict[str, int]:
    """Queue with Slurm what is neither done nor queued already; stage -> id of the new jobs.

    A job whose stage has failed is ending, and jobs that wait for it will be cancelled by Slurm within a second: they
    are replaced now, as is one that can never start.
    """
    with run.lock():
        left = {stage.name for stage in manifest.left(run, list(STAGES.values()))}
        alive = {name: job for name, job in probe.jobs(run.id).items() if job.alive and name in left and not _ending(run, name, job)}
        todo = {stage.name for stage in stages if stage.name in left and (stage.name not in alive or _stuck(alive[stage.name]))}
        for name in list(todo):
            todo |= {stage.name for stage in descendants(STAGES[name]) if stage.name in alive and alive[stage.name].state == "PENDING"}
        replaced = [alive.pop(name).id for name in todo & set(alive)]
        if replaced:
            sbatch.cancel(replaced)
        chain = [stage for stage in STAGES.values() if stage.name in todo]
        missing = [parent for stage in chain for parent in stage.parents if parent in left and parent not in todo and parent not in alive]
        if missing:
            raise Failed(f"{missing[0]} of {run.folder} is neither done nor queued; queue it and what follows with: "
                         f"python -m launcher resume {run.folder}")
        move_stale_aside(run, chain)
        resources, profile = build_plain("resources", run.config["resources"]), Profile(**run.config["profile"])
        requests = {stage: sbatch.stage_request(run, stage, getattr(resources, stage.name), profile) for stage in chain}
        return sbatch.submit_chain(run, requests, {name: job.id for name, job in alive.items()}) if requests else {}


def cancel(run: Run) -> str:
    """Stop everything of a run, wait until it has stopped, and say what it was."""
    if runner := run.runner():
        local.cancel(run)
        return f"stopped the local runner (process {runner['pid']})"
    if not run.uses_slurm():
        return "nothing is running"
    alive = _alive(run)
    if not alive:
        return "nothing is running or queued"
    run.record("cancelled", jobs=alive)
    sbatch.cancel(list(alive.values()))
    deadline = time.monotonic() + CANCEL_S
    while _alive(run):
        if time.monotonic() > deadline:
            raise Failed(f"Slurm has not ended {_alive(run)} within {CANCEL_S} s of scancel; squeue shows why")
        time.sleep(0.1)
    return "cancelled " + ", ".join(f"{stage} {job}" for stage, job in alive.items())


def _alive(run: Run) -> dict[str, int]:
    return {name: job.id for name, job in probe.jobs(run.id).items() if job.alive}


def _ending(run: Run, stage: str, job: probe.Job) -> bool:
    status = run.status(stage)
    return status["state"] in ("failed", "cancelled") and status["job"] == job.id and job.state != "PENDING"


def _stuck(job: probe.Job) -> bool:
    return job.reason == "DependencyNeverSatisfied"
