"""The command line. Each command only names its options and calls one function; what they need is
imported when they run."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import click

from launcher import completion
from launcher.config.stages import FULL, NAMES, PIPELINES, PPO
from launcher.status.terminal import say
from training.config.schema import ConfigError

TARGETS = completion.Names([FULL, *NAMES])
STAGE = completion.Names(NAMES)


class Commands(click.Group):
    """Turns the project's errors into click's: a user's mistake exits 2 with its fix, anything else
    that went wrong exits 1."""

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order in which a person needs them, not of the alphabet."""
        return [
            "doctor",
            "plan",
            "submit",
            "render",
            "status",
            "watch",
            "logs",
            "resume",
            "cancel",
            "report",
            "completion",
        ]

    def invoke(self, context: click.Context):
        from launcher.run.folder import Busy, Failed
        from launcher.run.manifest import Refused
        from launcher.slurm.commands import SlurmError
        from launcher.status.terminal import plain

        try:
            return super().invoke(context)
        except ConfigError as error:
            raise click.UsageError(plain(error)) from None
        except BrokenPipeError:  # | head: its reader has seen enough; click ends quietly
            raise
        except (Failed, SlurmError, Busy, Refused, OSError) as error:
            raise click.ClickException(plain(error)) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main():
    """Convoy: RLHF on Slurm. From a Hugging Face checkpoint (BLOOM, Llama) through SFT, reward
    model and PPO, GRPO or DPO to a report.

    \b
    What is here:                doctor
    Try it on this machine:      submit full-pipeline --wait
    DPO instead of PPO:          submit full-pipeline --pipeline dpo --name dpo
    See what would run:          plan full-pipeline --recipe bloom-7b1 --profile a100
    On a cluster:                submit full-pipeline --recipe bloom-7b1 --profile a100
    Then:                        status RUN, watch RUN, logs RUN -f, report RUN
    After a failure:             resume RUN

    \b
    RUN is a run's folder (runs/demo) or its name below runs/ (demo).
    Exit codes of a command:
      0    done: started, queued, shown; with --wait all stages are DONE
      1    it failed, or Slurm refused or did not answer; nothing is left half queued
      2    a mistake on the command line, in a configuration or in the data; nothing was started
      130  interrupted by Ctrl-C
    Exit codes of a stage's job:
      0    DONE
      75   saved and queued again
      64   bad configuration
      65   bad data or a damaged checkpoint
      73   a file can't be read or written
      74   full disk
      76   paused or stopped by a health gate
      4    too few valid ratings for an average
      143  stopped
      others: it failed, status says why
    """


def plan_options(command, tolerant: bool = False):
    """Options that choose what runs, with what, where; the command gets the checked Plan as
    ``made``; ``tolerant``: also one with mistakes."""

    @click.argument("target", type=TARGETS)
    @click.option(
        "--pipeline",
        type=completion.Names(list(PIPELINES)),
        help=f"How preferences are learnt.  [default: the run's, else the first that has the stage: {PPO}]",
    )
    @click.option(
        "--recipe",
        default="bloom-tiny",
        show_default=True,
        shell_complete=completion.recipes,
        help="Starting point: a file of launcher/recipes, without .toml.",
    )
    @click.option(
        "--config",
        "files",
        multiple=True,
        type=click.Path(dir_okay=False, path_type=Path),
        help="TOML file whose keys win over the recipe's; may be repeated.",
    )
    @click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        shell_complete=completion.keys,
        help="One key, wins over all files; may be repeated.",
    )
    @click.option("--name", help="Name of the run.  [default: the recipe's]")
    @click.option(
        "--runs",
        default="runs",
        show_default=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of all runs.",
    )
    @click.option(
        "--profile",
        metavar="NAME|FILE.toml",
        shell_complete=completion.profiles,
        help="Site: local, dev, a100, h200, h800 or a file.  [default: $CONVOY_PROFILE, "
        "~/.config/convoy.toml; "
        "else local, or dev when its cluster runs; a cluster's login node has none]",
    )
    @click.option("--from", "first", type=STAGE, help=f"First stage of {FULL}; those before it must be DONE.")
    @click.option("--until", "last", type=STAGE, help=f"Last stage of {FULL}.")
    @click.option(
        "--reuse",
        metavar="RUN",
        type=click.Path(path_type=Path),
        shell_complete=completion.runs,
        help="Take stages that RUN has done with the same settings and rows instead of running them.",
    )
    @click.option(
        "--sweep",
        "sweeps",
        multiple=True,
        metavar="SECTION.KEY=VALUE,VALUE",
        shell_complete=completion.keys,
        help="A run for each value, RUN/0, RUN/1, ...; repeated, for each combination. One job array a stage.",
    )
    @functools.wraps(command)
    def wrapped(target, pipeline, recipe, files, sets, name, runs, profile, first, last, reuse, sweeps, **rest):
        from launcher.run.folder import named
        from launcher.slurm import sites
        from launcher.submit import create

        chosen, reused = sites.choose(profile), named(reuse, runs) if reuse else None

        def make(more, name, runs):
            return create.plan(
                target, recipe, list(files), [*sets, *more], name, runs, chosen, first, last, pipeline, reused, tolerant
            )

        if not sweeps:
            return command(make([], recipe if name is None else name, runs), **rest)
        from launcher.submit import sweep

        sweep.refuse_set_twice(sweeps, sets)
        return command(sweep.plan(sweeps, make, recipe if name is None else name, runs), **rest)

    return wrapped


def run_argument(command):
    """Argument RUN: a folder, or a name below runs/; the command gets the opened Run."""

    @click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
    @functools.wraps(command)
    def wrapped(run, **rest):
        from launcher.run.folder import named

        return command(named(run, Path("runs")), **rest)

    return wrapped


def run_or_sweep(command):
    """Argument RUN: as in ``run_argument``, or the folder or name of a sweep; the command gets the
    Runs."""

    @click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
    @functools.wraps(command)
    def wrapped(run, **rest):
        from launcher.run.folder import Runs

        return command(Runs.open([run], Path("runs")), **rest)

    return wrapped


def runs_argument(command):
    """Arguments RUN...: as RUN; none means all below --runs. The command gets the opened Runs, and
    whether they were ``named``."""

    @click.argument(
        "runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path), shell_complete=completion.runs
    )
    @click.option(
        "--runs",
        "below",
        default="runs",
        show_default=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of all runs.",
    )
    @functools.wraps(command)
    def wrapped(runs, below, **rest):
        from launcher.run.folder import Runs

        return command(Runs.open(runs, below), **rest)

    return wrapped


@main.command(short_help="Check everything, then run or queue the chain.")
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
      submit full-pipeline --pipeline dpo --name dpo                sft, then dpo on the pairs: neither reward model nor rlhf
      submit rlhf --name hh                                         one stage
      submit full-pipeline --pipeline grpo --name g --reuse hh      GRPO from the SFT and reward model of another run
      submit full-pipeline --name lr --sweep sft.lr=1e-5,2e-5       a run for each value: runs/lr/0, runs/lr/1
    The same command again goes on with what is left, and starts nothing twice.
    """
    from launcher import plan
    from launcher.status import failures

    if dry_run:
        plan.present(made, failures.console())
    else:
        context.exit(plan.carry_out(made, wait, failures.console()))


@main.command(short_help="What would run: graph, hours, memory, disk, start.")
@functools.partial(plan_options, tolerant=True)
@click.option("--scripts", is_flag=True, help="Print the batch script of each stage, too.")
@click.option(
    "--suggest",
    is_flag=True,
    help="Name what is fastest on paper (launcher/estimates/step_time.py): the layout of sft, the token budget of rlhf.",
)
def plan(made, scripts, suggest):
    """Show the graph, GPU-hours, memory of a GPU, disk and possible start, and every mistake that
    can be found before anything is queued.

    \b
      plan full-pipeline
      plan full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      plan rlhf --name hh --scripts
    """
    from launcher import plan
    from launcher.status import failures

    plan.present(made, failures.console(), scripts)
    if suggest:
        plan.suggest(made, failures.console())


@main.command(short_help="Print the batch scripts.")
@click.option(
    "--committed",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _option, asked: _committed(context, asked),
    help="Write the generic scripts slurm/<stage>.sbatch (for developers; a test holds them equal).",
)
@plan_options
def render(made):
    """Print the batch script of each selected stage, as submit would write it.

    \b
      render full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      render rlhf --name hh --profile dev
      render --committed
    """
    from launcher import plan

    for stage, text in plan.scripts_of(made).items():
        say(f"# ---- {stage} ----\n{text}")


@main.command(short_help="Where each stage is, and why it waits.")
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
    seen = state.look_at(runs, broken=broken)
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


@main.command(short_help="Status, live.")
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


@main.command(short_help="All ranks' lines in order of time.")
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


@main.command(short_help="Go on after a failure, a cancel or a crash.")
@run_or_sweep
@click.option(
    "--from",
    "first",
    type=STAGE,
    help="This stage begins anew, or at --load-iteration, and all that was built from it.",
)
@click.option("--until", "last", type=STAGE, help="Last stage to run.  [default: as the run was submitted]")
@click.option("--all", "everything", is_flag=True, help="Run all stages, however the run was submitted.")
@click.option(
    "--load-iteration",
    "iteration",
    type=click.IntRange(min=0),
    help="Saved iteration to go on from.  [default: the last whole one; its stage: --from, else the first that is not DONE]",
)
@click.option(
    "--config",
    "files",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="TOML file with changed keys.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    shell_complete=completion.keys,
    help="One changed key; may be repeated.",
)
@click.option(
    "--profile",
    metavar="NAME|FILE.toml",
    shell_complete=completion.profiles,
    help="Go on at another site, or here: local.",
)
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


@main.command(short_help="Stop a run.")
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

    for run, words in cancel(runs).items():
        say(words if len(runs) == 1 else f"{run.folder}: {words}")


@main.command(short_help="One HTML page about a run, or several side by side.")
@click.argument(
    "runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path), shell_complete=completion.runs
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Where it goes.  [default: the run's folder; of several runs report-A-B beside the first]",
)
@click.option("--open", "show", is_flag=True, help="Open it in the browser.")
def report(runs, output, show):
    """Make report.html from what the runs' folders hold, finished or not, and print its path. The
    page loads nothing: send it to anyone.

    \b
      report bloom-tiny --open
      report lr                                 all runs of a sweep side by side
      report first second --output comparison   with table.md, table.csv and results.json of both together
      report first evaluation                   with the output of python -m eval.mtbench beside it
    """
    from launcher.status.report import make

    path = make(runs, output)
    say(path)
    if show:
        click.launch(str(path))


@main.command(short_help="What this site has, and what follows from it.")
@click.option(
    "--node", "on_node", is_flag=True, help="Look at a compute node, too (one small job): driver, NCCL, Apex, fabric."
)
@click.option(
    "--write",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.toml",
    help="Write a profile from the findings.",
)
@click.option(
    "--partition",
    help="Partition that the node and the profile are for.  [default: the open one with most GPUs a node]",
)
@click.option(
    "--profile",
    metavar="NAME|FILE.toml",
    shell_complete=completion.profiles,
    help="Site whose partition, account, modules and container --node uses.",
)
@click.option(
    "--timeout",
    "timeout_s",
    default=120,
    show_default=True,
    type=click.IntRange(min=1),
    help="Seconds to wait for a node.",
)
@click.option("--json", "as_json", is_flag=True, help="Findings, and the profile's keys that follow from them.")
@click.pass_context
def doctor(context, on_node, write, partition, profile, timeout_s, as_json):
    """What this site has, and what follows from it for a run. Exit code 1 when something will not
    work.

    \b
      doctor
      doctor --node --write mine.toml                 then: submit full-pipeline --profile mine.toml
      doctor --node --profile mine.toml               the same modules and container as a stage
      doctor --json | jq '.findings[] | select(.level == "bad")'
    """
    from launcher.doctor import report as doctor
    from launcher.slurm import sites
    from launcher.status import failures

    if write:
        doctor.check_writable(write)
    report = doctor.examine(partition, sites.load(profile) if profile else None, on_node, timeout_s)
    click.echo(json.dumps(doctor.as_json(report), indent=2)) if as_json else doctor.shown(report, failures.console())
    if write:
        doctor.write_profile(report, write)
        click.echo(
            f"written: {write}; look it over, then: submit full-pipeline --profile {write}; or for good: "
            f"export {sites.VARIABLE}={write.resolve()}",
            err=True,
        )
    context.exit(1 if report.bad else 0)


def _agree(yes: bool, lines: list[str]) -> bool:
    """Show what a changed configuration means and ask, unless ``--yes``."""
    say("\n".join(lines))
    if not yes and not sys.stdin.isatty():
        raise ConfigError("this changes the run's configuration; add --yes to do so without being asked")
    return yes or click.confirm("go on?")


@main.command(name="completion", short_help="Code for bash, zsh and fish.")
@click.argument("shell", type=click.Choice(completion.SHELLS))
def completion_command(shell):
    """Print the code that makes a shell complete the command convoy: commands, run names, stages,
    recipes, profiles, keys of --set.

    \b
      eval "$(convoy completion bash)"                                  # into ~/.bashrc
      eval "$(convoy completion zsh)"                                   # into ~/.zshrc, after compinit
      completion fish > ~/.config/fish/completions/convoy.fish          # once, as: convoy completion fish
    """
    click.echo(completion.source(main, shell))


def _compare(sweeps: tuple[Path, ...], as_json: bool) -> None:
    from launcher.run.folder import sweep_of
    from launcher.status import failures
    from launcher.submit import sweep

    if as_json:
        click.echo(
            json.dumps([{"sweep": str(folder), "runs": sweep.comparison(folder)} for folder in sweeps], indent=2)
        )
        return
    for folder in sweeps:
        failures.console().print(sweep.table(folder))
        if lacking := len(sweep_of(folder)["values"]) - len(sweep.members(folder)):
            say(f"{folder}: {lacking} of its runs were never written: the same submit command completes it", err=True)


def _committed(context: click.Context, asked: bool) -> None:
    if asked:
        from launcher.slurm import sites
        from launcher.submit import create

        for path in create.render_committed(sites.CLUSTERS.parent):
            click.echo(path)
        context.exit()
