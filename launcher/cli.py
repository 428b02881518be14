"""The command line. Each command only names its options and calls one function; what they need is imported when they run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import click

from launcher.pipeline import FULL, STAGES
from training.config import ConfigError

TARGETS = click.Choice([FULL, *STAGES])
STAGE = click.Choice(list(STAGES))


class Commands(click.Group):
    """Turns the project's errors into click's: a user's mistake exits 2 with its fix, anything else that went wrong exits 1."""

    def invoke(self, context: click.Context):
        from launcher.manifest import Refused
        from launcher.probe import SlurmError
        from launcher.run import Busy
        from launcher.submit import Failed

        try:
            return super().invoke(context)
        except ConfigError as error:
            raise click.UsageError(str(error)) from None
        except (Failed, SlurmError, Busy, Refused, OSError) as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main():
    """Convoy: RLHF on Slurm. From a Hugging Face BLOOM checkpoint through SFT, reward model and PPO to an evaluation report.

    \b
    Try it on this machine:      submit full-pipeline --wait
    See what would run:          plan full-pipeline --recipe bloom-7b1 --profile a100
    On a cluster:                submit full-pipeline --recipe bloom-7b1 --profile a100
    Then:                        status RUN, logs RUN -f, report RUN
    After a failure:             resume RUN

    \b
    RUN is a run's folder (runs/demo) or its name below runs/ (demo).
    Exit codes: 0 done, 1 something failed, 2 a mistake on the command line or in a configuration, 130 interrupted.
    """


def plan_options(command):
    """Options that choose what runs, with what, where; the command gets the checked Plan as ``made``."""
    @click.argument("target", type=TARGETS)
    @click.option("--recipe", default="bloom-tiny", show_default=True, help="Starting point: a file of launcher/recipes, without .toml.")
    @click.option("--config", "files", multiple=True, type=click.Path(dir_okay=False, path_type=Path),
                  help="TOML file whose keys win over the recipe's; may be repeated.")
    @click.option("--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", help="One key, wins over all files; may be repeated.")
    @click.option("--name", help="Name of the run.  [default: the recipe's]")
    @click.option("--runs", default="runs", show_default=True, type=click.Path(file_okay=False, path_type=Path), help="Folder of all runs.")
    @click.option("--profile", metavar="NAME|FILE.toml",
                  help="Site: local, dev, a100, h800 or a file.  [default: dev when its cluster runs, else local]")
    @click.option("--from", "first", type=STAGE, help=f"First stage of {FULL}; those before it must be DONE.")
    @click.option("--until", "last", type=STAGE, help=f"Last stage of {FULL}.")
    @functools.wraps(command)
    def wrapped(target, recipe, files, sets, name, runs, profile, first, last, **rest):
        from launcher import cluster, submit

        chosen = cluster.choose(profile)
        return command(submit.plan(target, recipe, list(files), list(sets), name, runs, chosen, first, last), **rest)
    return wrapped


def run_argument(command):
    """Argument RUN: a folder, or a name below runs/; the command gets the opened Run."""
    @click.argument("run", type=click.Path(path_type=Path))
    @functools.wraps(command)
    def wrapped(run, **rest):
        from launcher.run import Run

        return command(Run.open(run if (run / "config.json").exists() or len(run.parts) > 1 else Path("runs") / run), **rest)
    return wrapped


@main.command()
@plan_options
@click.option("--wait", is_flag=True, help="Show progress until the end; exit 1 when a stage failed.")
@click.option("--dry-run", is_flag=True, help="Check and show the plan; write and start nothing.")
@click.pass_context
def submit(context, made, wait, dry_run):
    """Check everything, prepare the data, then run the chain, or one stage whose parents are DONE.

    \b
      submit full-pipeline --wait                                   the demo, here, in the foreground
      submit full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      submit full-pipeline --set data.source=harmless-base.test.jsonl.gz --name hh
      submit full-pipeline --until reward                           a part of the chain
      submit rlhf --name hh                                         one stage
    The same command again goes on with what is left, and starts nothing twice.
    """
    from launcher import start, submit, view

    view.console().print(view.plan_table(made) if dry_run else f"profile {made.profile.name}: {made.reason}")
    if not dry_run:
        context.exit(start.start(submit.create(made), made.stages, wait))


@main.command()
@plan_options
def plan(made):
    """Show the graph, what each stage asks for, and every mistake that can be found before anything is queued.

    \b
      plan full-pipeline
      plan full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
    """
    from launcher import view

    view.console().print(view.plan_table(made))


@main.command()
@click.option("--committed", is_flag=True, is_eager=True, expose_value=False,
              callback=lambda context, _option, asked: _committed(context, asked),
              help="Write the generic scripts slurm/<stage>.sbatch (for developers; a test holds them equal).")
@plan_options
def render(made):
    """Print the batch script of each selected stage, as submit would write it.

    \b
      render full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      render rlhf --name hh --profile dev
      render --committed
    """
    from launcher import submit

    for stage, text in submit.render_all(made).items():
        click.echo(f"# ---- {stage} ----\n{text}")


@main.command()
@run_argument
@click.option("--watch", is_flag=True, help="Redraw until every stage has ended; Ctrl-C leaves the run alone.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, a table a stage.")
def status(run, watch, as_json):
    """Where each stage is: state, iteration, key numbers, time left, job, and why it waits or how it ended.

    \b
      status bloom-tiny
      status runs/hh --watch
      status runs/hh --json | jq '.[] | select(.state == "failed").why'
    """
    from launcher import state, view

    if watch:
        view.watch_status(run, view.console())
        return
    found, trouble = state.states(run)
    if as_json:
        click.echo(json.dumps(state.as_json(found), indent=2))
    else:
        view.console().print(view.states_table(run, found, trouble))


@main.command()
@run_argument
@click.argument("stage", type=STAGE, required=False)
@click.option("-f", "--follow", is_flag=True, help="Wait for more until the stage has ended.")
def logs(run, stage, follow):
    """The merged log of a stage's newest attempt, each line tagged with its rank; without STAGE the one that wrote last.

    \b
      logs bloom-tiny
      logs runs/hh rlhf -f
    """
    from launcher import logs

    for line in logs.lines(run, stage or logs.newest_stage(run), follow):
        click.echo(line)


@main.command()
@run_argument
@click.option("--stage", type=STAGE, help="Run this stage again although it is DONE, and all that was built from it.")
@click.option("--iteration", type=click.IntRange(min=0), help="Saved iteration that --stage goes on from.  [default: its last]")
@click.option("--wait", is_flag=True, help="Show progress until the end; exit 1 when a stage failed.")
@click.pass_context
def resume(context, run, stage, iteration, wait):
    """Go on with a run after a failure, a cancel or a crash: what is DONE is not run again, what is queued not queued twice.

    \b
      resume bloom-tiny --wait
      resume runs/hh --stage rlhf --iteration 400
    """
    from launcher import start, submit

    submit.take_up(run, stage, iteration)
    context.exit(start.start(run, list(STAGES.values()), wait))


@main.command()
@run_argument
def cancel(run):
    """Stop a run: its jobs, or its process on this machine. Trainers save first where they get the time.

    \b
      cancel runs/hh
    """
    from launcher import start

    click.echo(start.cancel(run))


@main.command()
@run_argument
def report(run):
    """Print the path of the finished report, or say which stage has to finish first.

    \b
      xdg-open "$(python -m launcher report bloom-tiny)"
    """
    from launcher import state

    waiting = [row for row in state.states(run)[0] if row.state != "done"]
    if waiting:
        why = f" ({waiting[0].why})" if waiting[0].why else ""
        raise click.ClickException(f"no report yet: {waiting[0].stage} has to finish; it is {waiting[0].state}{why}")
    click.echo(run.folder / "report.html")


def _committed(context: click.Context, asked: bool) -> None:
    if asked:
        from launcher import cluster, submit

        for path in submit.render_committed(cluster.CLUSTERS.parent):
            click.echo(path)
        context.exit()
