"""Start what is left of a sweep's runs: as job arrays, or here one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher import run_module
from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Busy, elements
from launcher.submit import enqueue, local, start
from launcher.submit.job_array import members, values_text
from training.config.schema import usage


def start_sweep(folder: Path, stages: list[Stage], wait: bool) -> int:
    """Run or queue what is left of every element; the command's exit code: with ``wait`` 1 when one
    failed."""
    out, runs_of_sweep = start.console(), members(folder)
    if not any(manifest.left(member.run, stages) for member in runs_of_sweep):
        out.print(f"{folder}: {', '.join(stage.name for stage in stages)} of all runs done: nothing left to do")
        return 0
    if runs_of_sweep[0].run.config["profile"]["scheduler"] != "slurm":
        if busy := [member.run for member in runs_of_sweep if member.run.runner()]:
            out.print(
                f"{busy[0].folder} is being worked on by {start.other_worker(busy[0], False)}: nothing new is started"
            )
            return (
                start.wait_for([member.run for member in runs_of_sweep], [stage.name for stage in stages])
                if wait
                else 0
            )
        if wait:
            return run_here(folder, stages)
        command = run_module.command("launcher.submit.start_sweep", str(folder), *(stage.name for stage in stages))
        with open(folder / "runner.log", "a", encoding="utf-8") as log:
            process = local.detached(command, log)
        out.print(f"started in the background: process {process.pid}, one element after the other")
    else:
        queued = enqueue.queue_sweep(folder, stages)
        out.print(
            "queued: " + ", ".join(f"{stage} {job}" for stage, job in queued)
            if queued
            else "everything that is left is queued already"
        )
        if wait:
            return start.wait_for([member.run for member in runs_of_sweep], [stage.name for stage in stages])
    out.print(f"python -m launcher status {folder} compares them, cancel stops them")
    return 0


def run_here(folder: Path, stages: list[Stage]) -> int:
    """Every element here, one after the other; one that fails stops no other."""
    codes = []
    for member in members(folder):
        if manifest.left(member.run, stages):
            start.console().print(f"{member.run.folder}: {values_text([member.values])}")
            try:
                codes.append(start.run_here(member.run, stages))
            except Busy:
                start.console().print(f"{member.run.folder} is being worked on by another command: left to it")
                codes.append(1)
        if 130 in codes:
            return 130
    return max(codes, default=0)


def main(arguments: list[str]) -> int:
    """The elements one after the other, in the background."""
    ended = usage(arguments, "launcher.submit.start_sweep", "SWEEP STAGE...", __doc__)
    if ended is not None:
        return ended
    folder = Path(arguments[0])
    return run_here(folder, [elements(folder)[0].stages[name] for name in arguments[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
