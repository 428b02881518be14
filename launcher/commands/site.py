"""What concerns the site and the shell: doctor, completion."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher import completion
from launcher.commands.options import profile_option


@click.command(short_help="What this site has, and what follows from it.")
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
@profile_option("Site whose partition, account, modules and container --node uses.")
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


@click.command(name="completion", short_help="Code for bash, zsh and fish.")
@click.argument("shell", type=click.Choice(completion.SHELLS))
@click.pass_context
def completion_command(context, shell):
    """Print the code that makes a shell complete the command convoy: commands, run names, stages,
    recipes, profiles, keys of --set.

    \b
      eval "$(convoy completion bash)"                                  # into ~/.bashrc
      eval "$(convoy completion zsh)"                                   # into ~/.zshrc, after compinit
      completion fish > ~/.config/fish/completions/convoy.fish          # once, as: convoy completion fish
    """
    click.echo(completion.source(context.find_root().command, shell))
