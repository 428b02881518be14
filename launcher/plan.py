"""What ``plan`` shows: the graph, time and GPU-hours, memory of a GPU, disk, when Slurm could start
it. Nothing is written or queued."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from launcher.checks import disk as storage
from launcher.checks import plan_checks
from launcher.config import environment
from launcher.estimates import iteration_time, memory, step_time
from launcher.run.folder import Run, Runs
from launcher.slurm import commands
from launcher.submit import create, test_only
from launcher.submit.test_only import ExpectedStart
from training.config.trainers import RolloutConfig, SFTConfig
from training.errors import Mistakes

if TYPE_CHECKING:
    from launcher.submit.sweep import Sweep


def present(plan: create.Plan | Sweep, out: Console, scripts: bool = False) -> None:
    """Check with Slurm and show a run's plan, or a sweep's: its elements, and the plan of the
    first; then ConfigError for what is wrong."""
    texts = scripts_of(plan) if scripts else {}
    first = plan if isinstance(plan, create.Plan) else plan.plans[0]
    mistakes = Mistakes()
    mistakes.add(*first.checked.mistakes)
    starts = mistakes.of(test_only.expected_starts, first) or {}
    show(first, starts, out, texts)
    if plan is not first:
        number = len(plan.plans)
        out.print(
            f"a sweep of {number} such runs, {gpu_hours(first) * number:.4g} "
            "GPU-hours at most; one job array a stage, element by element"
        )
        for index, values in enumerate(plan.values):
            text = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            out.print(f"  {plan.folder / str(index)}: {text}", markup=False)
    mistakes.raise_if_any()


def suggest(plan: create.Plan | Sweep, out: Console) -> None:
    """Of supervised fine-tuning the layout that launcher/estimates/step_time.py finds fastest for
    the ranks that are asked for; of stages with rollouts what an iteration takes, and the fastest
    token budget (launcher/estimates/iteration_time.py)."""
    plan = plan if isinstance(plan, create.Plan) else plan.plans[0]
    for stage in plan.stages:
        config = plan_checks.stage_config(plan.run.folder, plan.tables, plan.graph, stage.name)
        if isinstance(config, SFTConfig | RolloutConfig):
            by = step_time if isinstance(config, SFTConfig) else iteration_time
            text = by.suggest(stage.name, plan.checked.shape, config, plan.resources(stage), plan.profile)
            out.print(text, markup=False, highlight=False)


def scripts_of(plan: create.Plan | Sweep) -> dict[str, str]:
    """Stage -> text of its batch script, as it will be queued."""
    if isinstance(plan, create.Plan):
        return create.render_all(plan)
    from launcher.submit import sweep  # late, as below: what starts jobs would cost a plan .1 s

    return sweep.scripts(plan)


def carry_out(plan: create.Plan | Sweep, wait: bool, out: Console) -> int:
    """Create and start it; the command's exit code."""
    from launcher.submit import start, start_sweep, sweep

    first = plan if isinstance(plan, create.Plan) else plan.plans[0]
    if first.profile.scheduler == "slurm" and (reason := commands.unusable()):
        raise commands.SlurmError(f"{reason}: nothing was queued; the same command does it once Slurm answers")
    test_only.expected_starts(first)  # raises where Slurm would refuse a stage
    out.print(
        "\n".join(
            [f"profile {first.profile.name}: {first.reason}", *(f"warning: {line}" for line in first.checked.warnings)]
        )
    )
    if plan is first:
        run = create.create(plan)
        _say_data(first, run, out)
        return start.start(run, plan.stages, wait)
    folder = sweep.create(plan)
    _say_data(first, first.run, out)
    return start_sweep.start_sweep(folder, first.stages, wait)


def _say_data(plan: create.Plan, run: Run, out: Console) -> None:
    """What is dropped and cut of all rows, except for what the plan has said of them."""
    for line in run.data_summary().get("lines", []):
        if line not in plan.checked.warnings:
            out.print(f"data: {line}", markup=False, highlight=False)


def go_on(runs: Runs, wait: bool) -> int:
    """Start what is left of a run, or of a sweep; the command's exit code."""
    from launcher.submit import start, start_sweep

    stages = runs[0].selected()
    if rest := [name for name in runs[0].stages if name not in {stage.name for stage in stages}]:
        print(
            f"submitted until {stages[-1].name}: {', '.join(rest)} not started; --until STAGE or --all changes it",
            flush=True,
        )
    return start_sweep.start_sweep(runs.sweeps[0], stages, wait) if runs.sweeps else start.start(runs[0], stages, wait)


def show(plan: create.Plan, starts: dict[str, ExpectedStart], out: Console, scripts: dict[str, str]) -> None:
    """Print the plan; ``scripts``, stage -> batch script, come first, so that the summary stays on
    the screen."""
    for stage, text in scripts.items():
        out.print(f"# ---- {stage}.sbatch ----\n{text}", markup=False, highlight=False)
    out.print(Group(_graph(plan, starts), *([_memory(plan)] if plan.checked.estimates else []), *_notes(plan, starts)))


def gpu_hours(plan: create.Plan) -> float:
    """At most, if every stage used all of its time."""
    resources = [plan.resources(stage) for stage in plan.stages]
    return sum((one.nodes + one.spares) * one.gpus_per_node * one.minutes / 60 for one in resources)


def size(gb: float) -> str:
    return f"{gb:.1f}" if gb >= 0.05 else "<0.1"


def _graph(plan: create.Plan, starts: dict[str, ExpectedStart]) -> Table:
    slurm, works = plan.profile.scheduler == "slurm", plan.checked.work
    table = Table(
        "stage",
        "after",
        "runs",
        "nodes x ranks",
        "limit, h",
        "GPU-hours",
        *(["work, h", "requeues"] if works else []),
        "layout",
        "writes",
        *(["could start"] if slurm else []),
        title=str(plan.run.folder),
        title_justify="left",
    )
    for stage in plan.stages:
        resources, config = plan.resources(stage), plan.tables[stage.name]
        gpus = (resources.nodes + resources.spares) * resources.gpus_per_node
        nodes = f"{resources.nodes} + {resources.spares} spare" if resources.spares else str(resources.nodes)
        layout = _layout(config, resources.ranks) if stage.trainer else ""
        start, disk = [_start(stage.name, plan, starts)] if slurm else [], plan.checked.disk.get(stage.name)
        work = works.get(stage.name)
        takes = [f"{work.hours:.3g}", str(work.requeues)] if work else [("?" if stage.trainer else ""), ""]
        table.add_row(
            stage.name,
            ", ".join(stage.parents) or "-",
            stage.module,
            f"{nodes} x {resources.ranks_per_node}",
            f"{resources.minutes / 60:.3g}",
            f"{gpus * resources.minutes / 60:.4g}",
            *(takes if works else []),
            layout,
            "?" if disk is None else storage.format_gb(disk),
            *start,
        )
    site = f"profile {plan.profile.name}: {plan.reason}"
    table.caption = f"{gpu_hours(plan):.4g} GPU-hours, one job a stage at its time limit; {site}"
    if works:
        total_hours, names = sum(work.gpu_hours for work in works.values()), ", ".join(works)
        table.caption = (
            f"GPU-hours: of one job a stage, at its time limit ({gpu_hours(plan):.4g} together). By "
            f"the estimate {names} take "
            f"{total_hours:.4g}; {site}"
        )
    return table


def _layout(config: dict, ranks: int) -> str:
    """E.g. "TP 8 x PP 1 x DP 2, batch 128 = 16 x 8 x 1"."""
    data = max(1, ranks // (config["tensor_parallel"] * config["pipeline_parallel"]))
    steps = config["global_batch_size"] // (config["micro_batch_size"] * data)
    return (
        f"TP {config['tensor_parallel']} x PP {config['pipeline_parallel']} x DP {data}, "
        f"batch {config['global_batch_size']} = {config['micro_batch_size']} x {data} x {steps}"
    )


def _start(stage: str, plan: create.Plan, starts: dict[str, ExpectedStart]) -> str:
    if stage not in starts or not starts[stage].time:
        return "?"
    chosen = {one.name for one in plan.stages}
    waits = [parent for parent in plan.graph[stage].parents if parent in chosen]
    return f"after {', '.join(waits)}" if waits else starts[stage].time.replace("T", " ")


def _memory(plan: create.Plan) -> Table:
    table = Table(
        "stage", "model", "GB of each GPU", "of which", title="memory of a GPU, estimated", title_justify="left"
    )
    for stage, estimate in plan.checked.estimates.items():
        models: dict[str, list[tuple[str, float]]] = {}
        for what, gb in estimate.lines:
            name, _, part = what.partition(": ")
            models.setdefault(name if part else "", []).append((part or what, gb))
        for name, parts in models.items():
            table.add_row(
                stage,
                name or "at work",
                size(sum(gb for _, gb in parts)),
                ", ".join(f"{part} {size(gb)}" for part, gb in parts),
            )
        table.add_row(
            stage,
            "together",
            size(estimate.total),
            f"CUDA, NCCL and fragments {memory.OUTSIDE_GB:g} among it",
            end_section=not estimate.host,
        )
        if estimate.host:
            table.add_row(
                stage,
                "host memory",
                size(sum(gb for _, gb in estimate.host)),
                "of each rank, pinned: what waits for its turn",
                end_section=True,
            )
    limit = plan.profile.gpu_memory_gb
    table.caption = (
        f"a GPU has {limit:g} GB"
        if limit
        else f"profile {plan.profile.name} does not say what a GPU has: gpu_memory_gb"
    )
    return table


def own_sbatch_options(plan: create.Plan) -> list[str]:
    """A line for each stage with options of sbatch of its own, e.g. "rlhf: sbatch --partition=long,
    where the profile has --partition=main"."""
    lines = []
    for stage in plan.stages:
        site = plan.profile.sbatch_options()
        requested = plan.resources(stage).sbatch_options()
        if own := {name: value for name, value in requested.items() if site.get(name) != value}:
            instead = _as_typed({name: site[name] for name in own if name in site})
            lines.append(
                f"{stage.name}: sbatch {_as_typed(own)}" + (f", where the profile has {instead}" if instead else "")
            )
    return lines


def _as_typed(options: dict) -> str:
    """E.g. "--partition=low --contiguous"."""
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items())


def _notes(plan: create.Plan, starts: dict[str, ExpectedStart]) -> list[Text]:
    """Disk, data, why Slurm can't say a start, requeues, and what may go wrong, a line each."""
    checked, total = plan.checked, sum(plan.checked.disk.values())
    room = f"{storage.format_gb(checked.free_space.free_gb)} are {checked.free_space.where}"
    notes = [
        Text(f"disk: about {storage.format_gb(total)} at most at once; {room}" if checked.disk else f"disk: {room}")
    ]
    notes += [Text(f"data: {checked.data}")] if checked.data else []
    notes += [
        Text(f"start: {why}")
        for why in dict.fromkeys(one.unknown_reason for one in starts.values() if one.unknown_reason)
    ]
    if plan.profile.scheduler == "slurm":
        notes += [Text(line) for line in own_sbatch_options(plan)]
        if line := environment.note(plan.profile.passed):
            notes.append(Text(f"environment: {line}"))
    for name, work in checked.work.items():
        if work.requeues:
            limit = getattr(checked.resources, name).minutes / 60
            notes.append(
                Text(
                    f"{name}: about {work.hours:.3g} h of work ({work.gpu_hours:.4g} GPU-hours) in jobs "
                    f"of {limit:.3g} h: it saves and waits in the queue again {work.requeues} times"
                )
            )
    notes += [Text(f"warning: {line}", "yellow") for line in checked.warnings]
    return notes
