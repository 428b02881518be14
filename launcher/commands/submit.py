"""What starts a run, and what would be started: submit, plan, render."""

from __future__ import annotations

import functools

import click

from launcher.commands.options import plan_options
from launcher.status.terminal import say


@click.command(short_help="Check everything, then run or queue the chain.")
@plan_options
@click.option("--wait", is_flag=True, help="Show progress until the end; exit 1 when a stage failed.")
@click.option("--dry-run", is_flag=True, help="Check and show the plan; write and start nothing.")
@click.pass_context
def submit(context, planned, wait, dry_run):
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
        plan.present(planned, failures.console())
    else:
        context.exit(plan.carry_out(planned, wait, failures.console()))


@click.command(short_help="What would run: graph, hours, memory, disk, start.")
@functools.partial(plan_options, tolerant=True)
@click.option("--scripts", is_flag=True, help="Print the batch script of each stage, too.")
@click.option(
    "--suggest",
    is_flag=True,
    help="Name what is fastest on paper (launcher/estimates/step_time.py): the layout of sft, the token budget "
    "of rlhf.",
)
def plan(planned, scripts, suggest):
    """Show the graph, GPU-hours, memory of a GPU, disk and possible start, and every mistake that
    can be found before anything is queued.

    \b
      plan full-pipeline
      plan full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      plan rlhf --name hh --scripts
    """
    from launcher import plan
    from launcher.status import failures

    plan.present(planned, failures.console(), scripts)
    if suggest:
        plan.suggest(planned, failures.console())


def _render_committed(context: click.Context, _option, value: bool) -> None:
    """Write slurm/<stage>.sbatch and print their paths."""
    if value:
        from launcher.slurm import sites
        from launcher.submit import create

        for path in create.render_committed(sites.CLUSTERS.parent):
            click.echo(path)
        context.exit()


@click.command(short_help="Print the batch scripts.")
@click.option(
    "--committed",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_render_committed,
    help="Write the generic scripts slurm/<stage>.sbatch (for developers; a test holds them equal).",
)
@plan_options
def render(planned):
    """Print the batch script of each selected stage, as submit would write it.

    \b
      render full-pipeline --recipe bloom-7b1 --profile a100 --set model.checkpoint=models/bloom-7b1
      render rlhf --name hh --profile dev
      render --committed
    """
    from launcher import plan

    for stage, text in plan.scripts_of(planned).items():
        say(f"# ---- {stage} ----\n{text}")
