"""Start what is left of a sweep's runs: as job arrays, or here one after the other."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher import run_module
from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Busy, elements, sweep_of
from launcher.submit import local, start
from launcher.submit.job_array import format_values, index_of
from training.config.schema import usage


def start_sweep(folder: Path, stages: list[Stage], wait: bool) -> int:
    """Run or queue what is left of every element; the command's exit code: with ``wait`` 1 when one
    failed."""
    out, runs, names = start.console(), elements(folder), [stage.name for stage in stages]
    if not any(manifest.left(run, stages) for run in runs):
        out.print(f"{folder}: {', '.join(names)} of all runs done: nothing left to do")
        return 0
    if runs[0].config["profile"]["scheduler"] == "slurm":
        out.print(start.queue_rest(runs, stages))
        if wait:
            return start.wait_for(runs, names)
    elif busy := [run for run in runs if run.runner()]:
        worker = start.other_worker(busy[0], False)
        out.print(f"{busy[0].folder} is being worked on by {worker}: nothing new is started")
        return start.wait_for(runs, names) if wait else 0
    elif wait:
        return run_here(folder, stages)
    else:
        command = run_module.command("launcher.submit.start_sweep", str(folder), *names)
        with open(folder / "runner.log", "a", encoding="utf-8") as log:
            process = local.detached(command, log)
        out.print(f"started in the background: process {process.pid}, one element after the other")
    out.print(f"python -m launcher status {folder} compares them, cancel stops them")
    return 0


def run_here(folder: Path, stages: list[Stage]) -> int:
    """Every element here, one after the other; one that fails stops no other."""
    codes, values = [], sweep_of(folder)["values"]
    for run in elements(folder):
        if manifest.left(run, stages):
            start.console().print(f"{run.folder}: {format_values([values[index_of(run)]])}")
            try:
                codes.append(start.run_here(run, stages))
            except Busy:
                start.console().print(f"{run.folder} is being worked on by another command: left to it")
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
