"""Start what is left of a run, here or with Slurm, wait for it."""

from __future__ import annotations

import time

from launcher import chain, jobs, local, manifest
from launcher.live import Watch
from launcher.pipeline import Stage
from launcher.rewind import move_stale_aside
from launcher.run import Run
from launcher.view import console, failures


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
        made = chain.queue(run, stages)
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
        return ", ".join(f"Slurm job {job.id} ({stage})" for stage, job in jobs.of_run(run).items() if job.alive)
    return ""


def run_here(run: Run, stages: list[Stage]) -> int:
    """The local profile in the foreground."""
    todo = manifest.left(run, stages)
    move_stale_aside(run, todo)
    names = [stage.name for stage in todo]
    watch = Watch(run, names, 0.5)
    try:
        with watch.shown():
            code = local.run_stages(run, todo, watch.tick)
            watch.tick(force=True)
    except KeyboardInterrupt:
        console().print(f"stopped; goes on from its last checkpoint with: python -m launcher resume {run.folder}")
        return 130
    return report_end(run, names, "failed" if code else "done")


def wait_for(run: Run, names: list[str]) -> int:
    """Watch a run that others work on until it is done or a stage has failed; Ctrl-C leaves it running."""
    watch = Watch(run, names, 1.0)
    try:
        with watch.shown():
            while (overall := watch.tick()) in ("", "running"):
                time.sleep(0.2)
    except KeyboardInterrupt:
        console().print(f"not waiting any longer; it goes on. stop it: python -m launcher cancel {run.folder}")
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
