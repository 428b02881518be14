"""Start what is left of a run, here or with Slurm, wait for it."""

from __future__ import annotations

import time
from pathlib import Path

from launcher.config.stages import ALL, Stage
from launcher.run import manifest
from launcher.run.folder import Busy, Run
from launcher.slurm import queue
from launcher.status.failures import console, failures
from launcher.status.state import RunStatus
from launcher.status.watch import Watch, poll_s
from launcher.submit import enqueue, local


def start(run: Run, stages: list[Stage], wait: bool) -> int:
    """Run or queue those of ``stages`` that are not done; the exit code of the command: with
    ``wait`` 1 when one failed."""
    out, names = console(), [stage.name for stage in stages]
    slurm = run.config["profile"]["scheduler"] == "slurm"
    if not manifest.left(run, stages):
        out.print(f"{run.folder}: {', '.join(names)} done: nothing left to do")
        return 0
    worker = other_worker(run, slurm)
    if not worker and slurm:
        out.print(queue_rest([run], stages))
    elif not worker:
        try:
            if wait:
                return run_here(run, stages)
            out.print(
                f"started in the background: process {local.start_in_background(run, manifest.left(run, stages))}"
            )
        except Busy:  # two commands at once: the other one was first
            worker = first_worker(run)
    if worker:
        out.print(f"{run.folder} is being worked on by {worker}: nothing new is started")
    if wait:
        code = wait_for([run], names, again=bool(worker))
        return start(run, stages, wait) if code == IDLE else code  # the other worker had less to do
    out.print(f"python -m launcher status {run.folder} shows it, cancel stops it")
    return 0


def queue_rest(runs: list[Run], stages: list[Stage]) -> str:
    """Queue what is left of the runs; what was queued, in words."""
    jobs = ", ".join(f"{stage} {job}" for stage, job in enqueue.queue(runs, stages))
    return f"queued: {jobs}" if jobs else "everything that is left is queued already"


def first_worker(run: Run) -> str:
    """Who was first, in words: it takes the lock a moment before it writes who it is. Busy where it
    does not."""
    for _ in range(100):
        if worker := other_worker(run, slurm=False):
            return worker
        time.sleep(0.05)
    raise Busy(f"another command holds {run.folder / '.lock'}; try again when it has ended")


IDLE = -1
"""wait_for's answer where stages are left that no one works on."""


def other_worker(run: Run, slurm: bool) -> str:
    """Who else works on the run, in words, so that nothing must be started: a local runner, or
    Slurm jobs when it is to run here."""
    if runner := run.runner():
        return f"a local runner (process {runner['pid']} on {runner['host']})"
    if not slurm and run.uses_slurm():
        return ", ".join(f"Slurm job {job.id} ({stage})" for stage, job in queue.of_run(run).items() if job.alive)
    return ""


def run_here(run: Run, stages: list[Stage]) -> int:
    """The local profile in the foreground."""
    todo = manifest.left(run, stages)
    names = [stage.name for stage in todo]
    watch = Watch([run], names, 0.5)
    try:
        with watch.shown():
            code = local.run_stages(run, todo, watch.tick)
            watch.tick(force=True)
    except KeyboardInterrupt:
        console().print(f"stopped; goes on from its last checkpoint with: python -m launcher resume {run.folder}")
        return 130
    return report_end(watch.statuses[0], names, "failed" if code else "done")


def wait_for(runs: list[Run], names: list[str], again: bool = False) -> int:
    """Watch runs that others work on until no one does, a single one until a stage has failed; 0
    where all are done, else 1.

    ``again``: IDLE where stages are left that no one works on. Ctrl-C leaves the runs alone: 130.
    """
    watch, ended = Watch(runs, names, poll_s(runs)), []
    try:
        with watch.shown():
            while not ended or "running" in ended:
                ended = watch.tick() or ended
                time.sleep(0.2)
    except KeyboardInterrupt:
        console().print(f"not waiting any longer; it goes on. stop it: python -m launcher cancel {_book(runs)}")
        return 130
    if again and "idle" in ended:
        return IDLE
    return max(report_end(one, names, overall) for one, overall in zip(watch.statuses, ended, strict=True))


def _book(runs: list[Run]) -> Path:
    """The folder that stands for the runs: the run's, or the sweep's."""
    return runs[0].folder if len(runs) == 1 else runs[0].folder.parent


def report_end(seen: RunStatus, names: list[str], overall: str) -> int:
    """Print how a run has ended; the exit code for it."""
    out, folder = console(), seen.run.folder
    if overall == "done":
        report = f"; report: {folder / 'report.html'}" if any(ALL[name].evaluation for name in names) else ""
        out.print(f"{folder}: {', '.join(names)} done{report}")
        return 0
    if overall == "idle":
        left = [row.stage for row in seen.stages if row.stage in names and row.state != "done"]
        out.print(f"{folder}: no one works on {', '.join(left)}; go on: python -m launcher resume {folder}")
    for line in failures(seen, names):
        out.print(line, markup=False)
    return 1
