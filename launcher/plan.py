"""What ``plan`` shows: the graph, time and GPU-hours, memory of a GPU, disk, when Slurm could start
it. Nothing is written or queued."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
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
from launcher.submit import create
from training.config.trainers import RolloutConfig, SFTConfig
from training.errors import ConfigError, Mistakes

if TYPE_CHECKING:
    from launcher.submit.sweep import Sweep

REFUSED = "allocation failure"
"""In the words of ``sbatch --test-only``: Slurm has looked at the request and would never run
it."""


AMBIGUOUS = "node configuration is not available"
"""It says so of a request that no node fits, and of one whose nodes are all down or drained: that
one may be queued."""


@dataclass(frozen=True)
class Start:
    """What ``sbatch --test-only`` says of one stage."""

    when: str
    """As Slurm prints it, e.g. "2026-11-23T23:43:25"; "" where it could not be asked."""
    nodes: str
    why: str = ""
    """Why it could not be asked."""


def ask_slurm(made: create.Plan) -> dict[str, Start]:
    """Stage -> when it could start if it were queued now. ConfigError, naming all of them, where
    Slurm would refuse a stage.

    {} under a local profile. Where no controller answers, each says so.
    """
    if made.profile.scheduler != "slurm":
        return {}
    if reason := commands.unusable():  # else sbatch would try for 10 s, and call it a refusal
        return dict.fromkeys((stage.name for stage in made.stages), Start("", "", reason))
    found, refused = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for stage, text in create.render_all(made).items():
            path = Path(folder) / f"{stage}.sbatch"
            path.write_text(text, encoding="utf-8")
            try:
                environ = environment.for_sbatch(made.profile.passed)
                words = commands.call("sbatch", "--test-only", str(path), environ=environ, with_errors=True)
                found[stage] = parse_start(words)
            except commands.SlurmError as error:
                if REFUSED not in str(error):
                    return dict.fromkeys((stage.name for stage in made.stages), Start("", "", str(error)))
                if AMBIGUOUS in str(error) and (away := _nodes_away(made)):
                    found[stage] = Start("", "", f"{away}; with all of them it may fit")
                    continue
                refused.append(
                    f"{stage}: Slurm would refuse it: {_words(str(error))} (it asks for {_asked(made, stage)}); change "
                    f"resources.{stage}, or partition, account and limits of profile {made.profile.name}"
                )
    if refused:
        raise ConfigError(*refused)
    return found


def present(made: create.Plan | Sweep, out: Console, scripts: bool = False) -> None:
    """Check with Slurm and show a run's plan, or a sweep's: its elements, and the plan of the
    first; then ConfigError for what is wrong."""
    texts = scripts_of(made) if scripts else {}
    first = made if isinstance(made, create.Plan) else made.plans[0]
    mistakes = Mistakes()
    mistakes.add(*first.checked.mistakes)
    starts = mistakes.of(lambda: ask_slurm(first)) or {}
    show(first, starts, out, texts)
    if made is not first:
        number = len(made.plans)
        out.print(
            f"a sweep of {number} such runs, {gpu_hours(first) * number:.4g} GPU-hours at most; one job array "
            f"a stage, element by "
            "element"
        )
        for index, values in enumerate(made.values):
            words = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
            out.print(f"  {made.folder / str(index)}: {words}", markup=False)
    mistakes.raise_if_any()


def suggest(made: create.Plan | Sweep, out: Console) -> None:
    """Of supervised fine-tuning the layout that launcher/estimates/step_time.py finds fastest for
    the ranks that are asked for; of stages with rollouts what an iteration takes, and the fastest
    token budget (launcher/estimates/iteration_time.py)."""
    made = made if isinstance(made, create.Plan) else made.plans[0]
    for stage in made.stages:
        config = plan_checks.stage_config(made.run.folder, made.tables, made.graph, stage.name)
        if isinstance(config, SFTConfig | RolloutConfig):
            by = step_time if isinstance(config, SFTConfig) else iteration_time
            words = by.suggest(stage.name, made.checked.shape, config, made.resources(stage), made.profile)
            out.print(words, markup=False, highlight=False)


def scripts_of(made: create.Plan | Sweep) -> dict[str, str]:
    """Stage -> text of its batch script, as it will be queued."""
    if isinstance(made, create.Plan):
        return create.render_all(made)
    from launcher.submit import sweep  # late, as below: what starts jobs would cost a plan .1 s

    return sweep.scripts(made)


def carry_out(made: create.Plan | Sweep, wait: bool, out: Console) -> int:
    """Create and start it; the command's exit code."""
    from launcher.submit import start, sweep

    first = made if isinstance(made, create.Plan) else made.plans[0]
    if first.profile.scheduler == "slurm" and (reason := commands.unusable()):
        raise commands.SlurmError(f"{reason}: nothing was queued; the same command does it once Slurm answers")
    ask_slurm(first)  # refuses what Slurm would refuse
    out.print(
        "\n".join(
            [f"profile {first.profile.name}: {first.reason}", *(f"warning: {line}" for line in first.checked.warnings)]
        )
    )
    if made is first:
        run = create.create(made)
        _say_data(first, run, out)
        return start.start(run, made.stages, wait)
    folder = sweep.create(made)
    _say_data(first, first.run, out)
    return sweep.begin(folder, first.stages, wait)


def _say_data(made: create.Plan, run: Run, out: Console) -> None:
    """What is dropped and cut of all rows, but for what the plan has said of them."""
    for line in run.data_summary().get("lines", []):
        if line not in made.checked.warnings:
            out.print(f"data: {line}", markup=False, highlight=False)


def go_on(runs: Runs, wait: bool) -> int:
    """Start what is left of a run, or of a sweep; the command's exit code."""
    from launcher.submit import start, sweep

    stages = runs[0].selected()
    if rest := [name for name in runs[0].stages if name not in {stage.name for stage in stages}]:
        print(
            f"submitted until {stages[-1].name}: {', '.join(rest)} not started; --until STAGE or --all changes it",
            flush=True,
        )
    return sweep.begin(runs.sweeps[0], stages, wait) if runs.sweeps else start.start(runs[0], stages, wait)


def parse_start(text: str) -> Start:
    """From sbatch's line "sbatch: Job 11 to start at TIME using 2 processors on nodes NODES in
    partition main"."""
    match = re.search(r"to start at (\S+)(?: .*?on nodes (\S+))?", text)
    return (
        Start(match[1], match[2] or "") if match else Start("", "", text.strip() or "sbatch --test-only said nothing")
    )


def show(made: create.Plan, starts: dict[str, Start], out: Console, scripts: dict[str, str]) -> None:
    """Print the plan; ``scripts``, stage -> batch script, come first, so that the summary stays on
    the screen."""
    for stage, text in scripts.items():
        out.print(f"# ---- {stage}.sbatch ----\n{text}", markup=False, highlight=False)
    out.print(Group(_graph(made, starts), *([_memory(made)] if made.checked.estimates else []), *_notes(made, starts)))


def gpu_hours(made: create.Plan) -> float:
    """At most, if every stage used all of its time."""
    asked = [made.resources(stage) for stage in made.stages]
    return sum((one.nodes + one.spares) * one.gpus_per_node * one.minutes / 60 for one in asked)


def size(gb: float) -> str:
    return f"{gb:.1f}" if gb >= 0.05 else "<0.1"


def _graph(made: create.Plan, starts: dict[str, Start]) -> Table:
    slurm, works = made.profile.scheduler == "slurm", made.checked.work
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
        title=str(made.run.folder),
        title_justify="left",
    )
    for stage in made.stages:
        asked, config = made.resources(stage), made.tables[stage.name]
        gpus = (asked.nodes + asked.spares) * asked.gpus_per_node
        nodes = f"{asked.nodes} + {asked.spares} spare" if asked.spares else str(asked.nodes)
        layout = _layout(config, asked.ranks) if stage.trainer else ""
        start, disk = [_start(stage.name, made, starts)] if slurm else [], made.checked.disk.get(stage.name)
        work = works.get(stage.name)
        takes = [f"{work.hours:.3g}", str(work.requeues)] if work else [("?" if stage.trainer else ""), ""]
        table.add_row(
            stage.name,
            ", ".join(stage.parents) or "-",
            stage.module,
            f"{nodes} x {asked.ranks_per_node}",
            f"{asked.minutes / 60:.3g}",
            f"{gpus * asked.minutes / 60:.4g}",
            *(takes if works else []),
            layout,
            "?" if disk is None else storage.amount(disk),
            *start,
        )
    table.caption = f"{gpu_hours(made):.4g} GPU-hours, one job a stage at its time limit; profile {made.profile.name}: {made.reason}"
    if works:
        whole, names = sum(work.gpu_hours for work in works.values()), ", ".join(works)
        table.caption = (
            f"GPU-hours: of one job a stage, at its time limit ({gpu_hours(made):.4g} together). By "
            f"the estimate {names} take "
            f"{whole:.4g}; profile {made.profile.name}: {made.reason}"
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


def _start(stage: str, made: create.Plan, starts: dict[str, Start]) -> str:
    if stage not in starts or not starts[stage].when:
        return "?"
    chosen = {one.name for one in made.stages}
    waits = [parent for parent in made.graph[stage].parents if parent in chosen]
    return f"after {', '.join(waits)}" if waits else starts[stage].when.replace("T", " ")


def _memory(made: create.Plan) -> Table:
    table = Table(
        "stage", "model", "GB of each GPU", "of which", title="memory of a GPU, estimated", title_justify="left"
    )
    for stage, estimate in made.checked.estimates.items():
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
    limit = made.profile.gpu_memory_gb
    table.caption = (
        f"a GPU has {limit:g} GB"
        if limit
        else f"profile {made.profile.name} does not say what a GPU has: gpu_memory_gb"
    )
    return table


def _notes(made: create.Plan, starts: dict[str, Start]) -> list[Text]:
    """Disk, data, why Slurm can't say a start, requeues, and what may go wrong, a line each."""
    checked, total = made.checked, sum(made.checked.disk.values())
    room = f"{storage.amount(checked.room.free_gb)} are {checked.room.where}"
    notes = [Text(f"disk: about {storage.amount(total)} at most at once; {room}" if checked.disk else f"disk: {room}")]
    notes += [Text(f"data: {checked.data}")] if checked.data else []
    notes += [Text(f"start: {why}") for why in dict.fromkeys(one.why for one in starts.values() if one.why)]
    if made.profile.scheduler == "slurm" and (line := environment.note(made.profile.passed)):
        notes.append(Text(f"environment: {line}"))
    for name, work in checked.work.items():
        if work.requeues:
            limit = getattr(checked.resources, name).minutes / 60
            notes.append(
                Text(
                    f"{name}: about {work.hours:.3g} h of work ({work.gpu_hours:.4g} GPU-hours) in jobs "
                    f"of {limit:.3g} h: "
                    f"it saves and waits in the queue again {work.requeues} times"
                )
            )
    notes += [Text(f"warning: {line}", "yellow") for line in checked.warnings]
    return notes


def _asked(made: create.Plan, name: str) -> str:
    asked = made.resources(made.graph[name])
    where = f"partition {made.profile.partition}" if made.profile.partition else "the default partition"
    return f"{asked.nodes + asked.spares} nodes x {asked.gpus_per_node} GPUs for {asked.minutes} min in {where}"


def _nodes_away(made: create.Plan) -> str:
    """ "3 of 4 nodes are down or drained", "" where none is."""
    partition = [f"--partition={made.profile.partition}"] if made.profile.partition else []
    states = [
        line.rstrip("*~#!%$@^-").lower()
        for line in commands.call("sinfo", "-h", "-N", *partition, "-o", "%T").splitlines()
    ]
    away = sum(not word.startswith(("idle", "mixed", "alloc", "comp")) for word in states)
    return f"{away} of {len(states)} nodes are down, drained or reserved" if away else ""


def _words(text: str) -> str:
    """The refusal itself, without what Slurm prints around it."""
    return next((line.partition(f"{REFUSED}: ")[2] for line in text.splitlines() if REFUSED in line), text)
