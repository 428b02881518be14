"""Arguments and options that several commands share."""

from __future__ import annotations

import functools
from pathlib import Path

import click

from launcher import completion
from launcher.config.stages import FULL, NAMES, PIPELINES, PPO

TARGETS = completion.Names([FULL, *NAMES])
STAGE = completion.Names(NAMES)


def config_option(text: str):
    return click.option("--config", "files", multiple=True, type=click.Path(dir_okay=False, path_type=Path), help=text)


def set_option(text: str):
    return click.option(
        "--set", "sets", multiple=True, metavar="SECTION.KEY=VALUE", shell_complete=completion.keys, help=text
    )


def profile_option(text: str):
    return click.option("--profile", metavar="NAME|FILE.toml", shell_complete=completion.profiles, help=text)


def runs_option(parameter: str):
    return click.option(
        "--runs",
        parameter,
        default="runs",
        show_default=True,
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder of all runs.",
    )


def plan_options(command, tolerant: bool = False):
    """Options that choose what runs, with which settings and where.

    The command gets the checked Plan (with --sweep a Sweep) as its first argument; ``tolerant``:
    also one with mistakes.
    """

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
    @config_option("TOML file whose keys win over the recipe's; may be repeated.")
    @set_option("One key, wins over all files; may be repeated.")
    @click.option("--name", help="Name of the run.  [default: the recipe's]")
    @runs_option("runs")
    @profile_option(
        "Site: a name of slurm/clusters, e.g. local, or a file.  [default: $CONVOY_PROFILE, ~/.config/convoy.toml; "
        "else local, or dev when its cluster runs; a cluster's login node has none]"
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

        request = create.SubmitRequest(
            target,
            recipe,
            runs,
            *sites.choose(profile),
            name=name,
            files=files,
            sets=sets,
            first=first,
            last=last,
            pipeline=pipeline,
            reused=named(reuse, runs) if reuse else None,
            tolerant=tolerant,
        )
        if not sweeps:
            return command(create.plan(request), **rest)
        from launcher.submit import sweep

        return command(sweep.plan(request, sweeps), **rest)

    return wrapped


def run_argument(command):
    """Argument RUN: a folder, or a name below runs/. The command gets the opened Run."""

    @click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
    @functools.wraps(command)
    def wrapped(run, **rest):
        from launcher.run.folder import named

        return command(named(run, Path("runs")), **rest)

    return wrapped


def run_or_sweep(command):
    """Argument RUN: as in ``run_argument``, or the folder or name of a sweep. The command gets the
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
    @runs_option("below")
    @functools.wraps(command)
    def wrapped(runs, below, **rest):
        from launcher.run.folder import Runs

        return command(Runs.open(runs, below), **rest)

    return wrapped
