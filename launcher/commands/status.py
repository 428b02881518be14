"""What shows a run: status, watch, logs, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from launcher import completion
from launcher.commands.options import run_argument, runs_argument
from launcher.config.stages import NAMES
from launcher.status.terminal import say
from training.errors import ConfigError


@click.command(short_help="Where each stage is, and why it waits.")
@runs_argument
@click.option("--json", "as_json", is_flag=True, help="One JSON list, a table a stage; times in seconds since 1970.")
def status(runs, as_json):
    """One screen a RUN: where each stage is, how fast, when it ends, what it waits for or how it
    ended. Without RUN a line for each run.

    \b
      status                              all runs below runs/
      status bloom-tiny
      status lr                           a sweep: its runs, side by side
      status hh hh-2 --json | jq '.[] | select(.state == "failed") | {run, stage, why, advice}'
    Slurm is asked once. Where it does not answer, or has forgotten a job, the run's own files tell.
    """
    import time

    from launcher.status import state, table, terminal

    if runs.sweeps:
        return _compare(runs.sweeps, as_json)
    broken = None if runs.named else list(runs.strangers)
    seen = state.statuses_of(runs, broken=broken)
    for line in broken or []:
        say(line, err=True)
    if as_json:
        click.echo(json.dumps(state.as_json(seen), indent=2))
        return
    width, now = terminal.width(), time.time()
    if not seen:
        raise ConfigError("none of these can be shown; name a run: python -m launcher status RUN")
    screens = [table.run_lines(one, width, now) for one in seen] if runs.named else [table.runs_lines(seen, width, now)]
    click.echo("\n\n".join("\n".join(lines) for lines in screens))


def _compare(sweeps: tuple[Path, ...], as_json: bool) -> None:
    """Print the runs of each sweep side by side."""
    from launcher.run.folder import elements, sweep_of
    from launcher.status import sweep_table
    from launcher.status.failures import console

    if as_json:
        tables = [{"sweep": str(folder), "runs": sweep_table.comparison(folder)} for folder in sweeps]
        click.echo(json.dumps(tables, indent=2))
        return
    for folder in sweeps:
        console().print(sweep_table.sweep_table(folder))
        if unwritten := len(sweep_of(folder)["values"]) - len(elements(folder)):
            say(f"{folder}: {unwritten} of its runs were never written: the same submit command completes it", err=True)


@click.command(short_help="Status, live.")
@runs_argument
@click.pass_context
def watch(context, runs):
    """Like status, live until nothing goes on any more; Ctrl-C leaves the run alone. With several
    runs, or none named, a line a run.

    \b
      watch bloom-tiny
      watch hh hh-2
    Exit code: 0 all is done, 1 something is not, 130 after Ctrl-C.
    """
    from launcher.status import watch as live

    for line in runs.strangers:
        say(line, err=True)
    context.exit(live.watch(runs))


@click.command(short_help="All ranks' lines in order of time.")
@run_argument
@click.argument("stage", type=completion.Names([*NAMES, "all"]), required=False)
@click.option(
    "-f",
    "--follow",
    is_flag=True,
    help="Wait for more until the stage has ended; without STAGE through all that follow.",
)
@click.option(
    "--rank",
    "ranks",
    default="",
    metavar="RANKS",
    help="Only these: 3, 0-7,12, launcher (the supervisor), srun, slurm.",
)
@click.option("--errors", is_flag=True, help="Only lines that look like errors, and whole tracebacks.")
@click.option("--attempt", default="", metavar="N|all", help="Which attempt.  [default: the newest]")
@click.option("-n", "--tail", "last", type=click.IntRange(min=1), help="Only so many lines from the end.")
def logs(run, stage, follow, ranks, errors, attempt, last):
    """All ranks' lines, the supervisor's and Slurm's, in order of time; [0-499] is a line that all
    of these ranks wrote.

    \b
      logs bloom-tiny                     the newest attempt of the stage that wrote last
      logs runs/hh -f                     this stage, and those that follow
      logs runs/hh rlhf --errors --attempt all
      logs runs/hh rlhf --rank 3,8-15 -n 100
    """
    from launcher.status import logs

    choice = logs.Choice(ranks, errors)
    if follow and attempt:
        raise ConfigError("--attempt shows what was, --follow what comes: leave one out")
    lines = logs.follow(run, stage, choice, last or 0) if follow else logs.show(run, stage, attempt, choice, last or 0)
    try:
        for line in lines:
            click.echo(line)
    except KeyboardInterrupt:
        sys.exit(130)


@click.command(short_help="One HTML page about a run, or several side by side.")
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path), shell_complete=completion.runs
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where it goes.  [default: the run's folder; of several runs report-A-B next to the first]",
)
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(runs, output, show):
    """Make report.html from what the runs' folders hold, finished or not, and print its path. The
    page loads nothing: send it to anyone.

    \b
      report bloom-tiny --open
      report lr                                 all runs of a sweep side by side
      report first second --output comparison   with table.md, table.csv and results.json of both together
      report first evaluation                   and the output of python -m eval.mtbench
    """
    from launcher.status.report import make

    path = make(runs, output)
    say(path)
    if show:
        click.launch(str(path))
