"""What changes a run that was submitted: resume, cancel."""

from __future__ import annotations

import functools
import sys

import click

from launcher.commands.options import STAGE, config_option, profile_option, run_or_sweep, set_option
from launcher.status.terminal import say
from training.errors import ConfigError


@click.command(short_help="Go on after a failure, a cancel or a crash.")
@run_or_sweep
@click.option(
    "--from",
    "first",
    type=STAGE,
    help="This stage starts over, or at --load-iteration, and all that was built from it.",
)
@click.option("--until", "last", type=STAGE, help="Last stage to run.  [default: as the run was submitted]")
@click.option("--all", "everything", is_flag=True, help="Run all stages, however the run was submitted.")
@click.option(
    "--load-iteration",
    "iteration",
    type=click.IntRange(min=0),
    help="Saved iteration to go on from.  [default: the last whole one; its stage: --from, else the first that is "
    "not DONE]",
)
@config_option("TOML file with changed keys.")
@set_option("One changed key; may be repeated.")
@profile_option("Go on at another site, or here: local.")
@click.option("--take-over", is_flag=True, help="Its host or cluster is gone for good: go on without it.")
@click.option("--yes", is_flag=True, help="Change the configuration without being asked.")
@click.option("--wait", is_flag=True, help="Show progress until the end; exit 1 when a stage failed.")
@click.pass_context
def resume(context, runs, first, last, everything, iteration, files, sets, profile, take_over, yes, wait):
    """Go on with a run after a failure, a cancel or a crash: what is DONE is not run again, what is
    queued not queued twice.

    It runs the stages that the run was submitted for; --until or --all changes that. A mistake
    changes nothing.

    \b
      resume bloom-tiny --wait
      resume runs/hh --from rlhf --load-iteration 400
      resume runs/hh --set resources.rlhf.minutes=600 --set rlhf.lr=5e-7
      resume runs/hh --profile local --take-over
      resume lr                                      all runs of a sweep
    """
    from launcher import plan
    from launcher.slurm import sites
    from launcher.submit import resume

    site = sites.load(profile) if profile else None
    wish = resume.Wish(first, iteration, files, sets, site, take_over, last, everything)
    for line in resume.take_up(runs, wish, functools.partial(_agree, yes)):
        say(line)
    context.exit(plan.go_on(runs, wait))


def _agree(yes: bool, lines: list[str]) -> bool:
    """Show what a changed configuration means and ask, unless ``--yes``."""
    say("\n".join(lines))
    if not yes and not sys.stdin.isatty():
        raise ConfigError("this changes the run's configuration; add --yes to do so without being asked")
    return yes or click.confirm("go on?")


@click.command(short_help="Stop a run.")
@run_or_sweep
def cancel(runs):
    """Stop a run: its jobs, retries that wait, its process on this machine. Trainers save first
    where they get the time.

    \b
      cancel runs/hh
      cancel lr                           all runs of a sweep
      cancel runs/lr/1                    one of them
    """
    from launcher.submit.cancel import cancel

    for run, message in cancel(runs).items():
        say(message if len(runs) == 1 else f"{run.folder}: {message}")
