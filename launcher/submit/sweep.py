"""A sweep: one run for each combination of values, ``runs/<sweep>/<index>``, queued as one job
array a stage.

The array's index is the run's folder; each element waits for its own parent only (aftercorr), so
that one that fails stops no other. ``sweep.json`` in the sweep's folder says which index has which
values. Without Slurm the elements run here, one after the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import run_module
from launcher.checks import disk
from launcher.config import environment
from launcher.config import key_file as passwords
from launcher.config.sections import build_plain, parse_set, tomllib
from launcher.config.stages import Stage, prepare_config
from launcher.run import manifest
from launcher.run.folder import SWEEP, Busy, Run, elements, hash_of, sweep_of, write_json, write_text
from launcher.slurm import commands, transaction
from launcher.slurm import queue as jobs
from launcher.slurm import script as sbatch
from launcher.status import state
from launcher.status import table as screen
from launcher.submit import create as submit
from launcher.submit import enqueue, start
from launcher.submit.rewind import move_stale_aside
from training.config.schema import usage
from training.errors import ConfigError

MOST = 1000
"""Elements; MaxArraySize of Slurm is 1001 unless the site says otherwise."""
SAME_FOR_ALL = ("model", "resources")
"""Sections that no element may change: an array asks for the same nodes and time for all."""


@dataclass(frozen=True)
class Member:
    """One element of a sweep."""

    index: int
    run: Run
    values: dict
    """Key, e.g. "sft.lr", -> value."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that passed its checks; nothing is written yet."""

    folder: Path
    identity: str
    values: list[dict]
    plans: list[submit.Plan]


def plan(texts: list[str], make: Callable[[list[str], str, Path], submit.Plan], name: str, runs: Path) -> Sweep:
    """``texts`` are the values of --sweep; ``make(sets, name, runs)`` plans one run. ConfigError
    for every mistake."""
    folder, values = runs / name, combinations(texts)
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} is a run, not a sweep; give the sweep another --name")
    known = read(folder) if (folder / SWEEP).exists() else None
    if known and known["values"] != values:
        raise ConfigError(
            f"{folder} was submitted with another sweep: {_words(known['values'])}; "
            "give the new one another --name, or repeat the old one's --sweep"
        )
    identity = known["id"] if known else f"{name}-{secrets.token_hex(4)}"
    plans = []
    for index, chosen in enumerate(values):
        made = make([f"{key}={in_toml(value)}" for key, value in chosen.items()], str(index), folder)
        run = {**made.identity, "id": f"{identity}.{index}", "sweep": {"id": identity, "index": index}}
        plans.append(dataclasses.replace(made, identity=run))
    first = plans[0].checked
    try:
        disk.check({str(index): sum(made.checked.disk.values()) for index, made in enumerate(plans)}, folder)
    except ConfigError as error:
        if not first.mistakes:  # else the plan is shown with them
            raise
        first.mistakes.append(str(error))
    return Sweep(folder, identity, values, plans)


def scripts(made: Sweep) -> dict[str, str]:
    """Stage -> text of its array's batch script, as it will be queued; writes nothing."""
    held = [
        Member(index, submit.Draft(one), values)
        for index, (one, values) in enumerate(zip(made.plans, made.values, strict=True))
    ]
    return {stage.name: script(made.folder, made.identity, stage, held) for stage in made.plans[0].stages}


def combinations(texts: list[str]) -> list[dict]:
    """``["sft.lr=1e-5,2e-5", "rlhf.kl_coef=0.01,0.05"]`` -> four tables key -> value, the last key
    changing fastest."""
    axes: dict[str, list] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        section = key.strip().partition(".")[0]
        values = _values(key, rest) if equals else []
        if len(values) < 2 or len({json.dumps(value) for value in values}) < len(values):
            raise ConfigError(
                f"--sweep {text}: expected section.key=VALUE,VALUE with two or more different values, "
                "e.g. --sweep sft.lr=1e-5,2e-5"
            )
        if section in SAME_FOR_ALL:
            raise ConfigError(
                f"--sweep {text}: all elements of a job array share section {section}; make runs of their own, by --name"
            )
        if key.strip() in axes:
            raise ConfigError(f"--sweep {text}: {key.strip()} is swept twice; give all its values at once")
        axes[key.strip()] = values
    if (number := math.prod(map(len, axes.values()))) > MOST:
        raise ConfigError(f"--sweep: {number} combinations; at most {MOST}")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def refuse_set_twice(sweeps: Sequence[str], sets: Sequence[str]) -> None:
    """ConfigError for a key that both ``--sweep`` and ``--set`` give: one of them would be
    ignored."""
    swept, fixed = ({text.partition("=")[0].strip() for text in texts} for texts in (sweeps, sets))
    for key in sorted(swept & fixed):
        raise ConfigError(f"{key} stands in --sweep and in --set; give it once: --sweep has the values of the runs")


def create(made: Sweep) -> Path:
    """Write the sweep's folder and those of its runs; data that is the same for all is prepared
    once. Repeating it changes nothing."""
    made.folder.mkdir(parents=True, exist_ok=True)
    with transaction.patient(Run(made.folder).lock):
        for one in made.plans:
            if one is not made.plans[0]:
                _share_data(made.plans[0], one)
            submit.prepare_first(one)
        write_json(made.folder / SWEEP, {"id": made.identity, "values": made.values})
        for one in made.plans:
            submit.create(one)
    return made.folder


def read(folder: Path) -> dict:
    return sweep_of(folder)


def members(folder: Path) -> list[Member]:
    """The runs of a sweep, by index."""
    values = sweep_of(folder)["values"]
    return [Member(int(run.folder.name), run, values[int(run.folder.name)]) for run in elements(folder)]


def begin(folder: Path, stages: list[Stage], wait: bool) -> int:
    """Run or queue what is left of every element; the command's exit code: with ``wait`` 1 when one
    failed."""
    out, found = start.console(), members(folder)
    if not any(manifest.left(member.run, stages) for member in found):
        out.print(f"{folder}: {', '.join(stage.name for stage in stages)} of all runs done: nothing left to do")
        return 0
    if found[0].run.config["profile"]["scheduler"] != "slurm":
        if busy := [member.run for member in found if member.run.runner()]:
            out.print(
                f"{busy[0].folder} is being worked on by {start.other_worker(busy[0], False)}: nothing new is started"
            )
            return start.wait_for([member.run for member in found], [stage.name for stage in stages]) if wait else 0
        if wait:
            return run_here(folder, stages)
        command = run_module.command("launcher.submit.sweep", str(folder), *(stage.name for stage in stages))
        with open(folder / "runner.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                env=environment.outside(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        out.print(f"started in the background: process {process.pid}, one element after the other")
    else:
        made = queue(folder, stages)
        out.print(
            "queued: " + ", ".join(f"{stage} {job}" for stage, job in made)
            if made
            else "everything that is left is queued already"
        )
        if wait:
            return start.wait_for([member.run for member in found], [stage.name for stage in stages])
    out.print(f"python -m launcher status {folder} compares them, cancel stops them")
    return 0


def run_here(folder: Path, stages: list[Stage]) -> int:
    """Every element here, one after the other; one that fails stops no other."""
    codes = []
    for member in members(folder):
        if manifest.left(member.run, stages):
            start.console().print(f"{member.run.folder}: {_words([member.values])}")
            try:
                codes.append(start.run_here(member.run, stages))
            except Busy:
                start.console().print(f"{member.run.folder} is being worked on by another command: left to it")
                codes.append(1)
        if 130 in codes:
            return 130
    return max(codes, default=0)


def queue(folder: Path, stages: list[Stage], only: int | None = None) -> list[tuple[str, str]]:
    """Queue what is neither done nor queued, of element ``only`` or of all: those with the same
    stages left make one array a stage.

    Returns (stage, "job[elements]") of each array.
    """
    book, said = Run(folder), []
    with transaction.patient(book.lock):
        transaction.settle(book)
        groups: dict[tuple, list[Member]] = {}
        chosen = members(folder) if only is None else [members(folder)[only]]
        known = jobs.of_runs([member.run for member in chosen])
        for member in chosen:
            todo, alive = enqueue.missing(member.run, stages, known[member.run.id])
            move_stale_aside(member.run, todo)
            waits = {
                parent: int(alive[parent].element.partition("_")[0])
                for stage in todo
                for parent in stage.parents
                if parent in alive
            }
            groups.setdefault((tuple(stage.name for stage in todo), tuple(waits.items())), []).append(member)
        for number, ((names, waits), held) in enumerate(groups.items()):
            if names:
                todo = [held[0].run.stages[name] for name in names]
                said += _queue_group(book, f"{number}" if len(groups) > 1 else "", todo, dict(waits), held)
    return said


def _queue_group(
    book: Run, mark: str, stages: list[Stage], waits: dict[str, int], held: list[Member]
) -> list[tuple[str, str]]:
    identity, array = read(book.folder)["id"], ",".join(str(member.index) for member in held)
    steps, profile = [], held[0].run.profile
    keys, passed = passwords.names(profile), profile.passed
    for stage in stages:
        path = book.folder / "scripts" / f"{stage.name}{mark and f'-{mark}'}.sbatch"
        write_text(path, script(book.folder, identity, stage, held))
        for member in held:
            (member.run.stage(stage.name) / "logs").mkdir(parents=True, exist_ok=True)
        before = tuple((parent, waits[parent]) for parent in stage.parents if parent in waits)
        steps.append(
            transaction.Step(stage.name, identity, path, stage.parents, before, "aftercorr", array, keys, passed)
        )
    made = transaction.submit(book, steps)
    for member, stage in itertools.product(held, stages):
        member.run.record("submitted", stage=stage.name, job=made[stage.name], element=member.index, after=[])
    return [(stage, f"{job}[{array}]") for stage, job in made.items()]


def script(folder: Path, identity: str, stage: Stage, held: list[Member]) -> str:
    """The batch script of a stage's array: index -> run folder in plain sight."""
    config = held[0].run.config
    resources = getattr(build_plain("resources", config["resources"]), stage.name)
    cases = [
        f"  {member.index}) run={shlex.quote(str(folder / str(member.index)))} ;;  # {_words([member.values])}"
        for member in held
    ]
    cases += ['  *) echo "element $SLURM_ARRAY_TASK_ID is none of this sweep" >&2; exit 64 ;;']
    site, supervise = held[0].run.profile, sbatch.supervise_here()
    return sbatch.script(
        sbatch.JobRequest(
            name=f"{identity}.{stage.name}",
            comment=commands.comment(identity, stage.name),
            resources=resources,
            profile=site,
            output=f"{str(folder).replace('%', '%%')}/%a/{stage.name}/logs/slurm-%A_%a.out",
            setup=('case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"),
            command=f'{shlex.join(supervise)} "$run" {stage.name}',
        )
    )


def comparison(folder: Path) -> list[dict]:
    """A table a run: {"element", "folder", "values", "state", "stage", "why", "numbers":
    {"sft.loss": 1.2, ...}}."""
    found = members(folder)
    made = []
    for member, seen in zip(found, state.statuses_of([member.run for member in found]), strict=True):
        at = next((row for row in seen.stages if row.state != "done"), seen.stages[-1])
        at = next((row for row in seen.stages if row.state in (*state.BAD, "running")), at)
        numbers = {f"{row.stage}.{name}": value for row in seen.stages for name, value in row.progress.numbers.items()}
        made.append(
            {
                "element": member.index,
                "folder": str(member.run.folder),
                "values": member.values,
                "state": screen.state_word(seen),
                "stage": at.stage,
                "iteration": at.progress.iteration,
                "why": at.why,
                "numbers": numbers,
            }
        )
    return made


def table(folder: Path):
    """``comparison`` as a rich table: a row a run, a column a swept key and a number of the stages
    that are swept or come later."""
    from rich.table import Table

    rows = comparison(folder)
    keys, names = list(rows[0]["values"]), list(dict.fromkeys(name for row in rows for name in row["numbers"]))
    columns = ("run", *keys, "state", "stage", "iteration", *names, "why")
    made = Table(*columns, title=f"{folder}  ({read(folder)['id']})", title_justify="left")
    for row in rows:
        numbers = [f"{row['numbers'][name]:.4g}" if name in row["numbers"] else "" for name in names]
        at = "" if row["iteration"] is None else str(row["iteration"])
        made.add_row(
            row["folder"],
            *(f"{row['values'][key]}" for key in keys),
            row["state"],
            row["stage"],
            at,
            *numbers,
            row["why"],
        )
    return made


def _share_data(first: submit.Plan, other: submit.Plan) -> None:
    """Copy the prepared data of ``first`` where ``other`` would prepare the same."""
    wanted, prepared = (dataclasses.asdict(prepare_config(one.run.folder, one.tables)) for one in (other, first))
    target = other.run.folder / "data"
    if {**wanted, "paths": None} != {**prepared, "paths": None} or (target / "DONE.json").exists():
        return
    for name in ("model", "data"):
        if (first.run.folder / name).exists():
            shutil.copytree(first.run.folder / name, other.run.folder / name, dirs_exist_ok=True)
    marker = json.loads((first.run.folder / "data" / "DONE.json").read_text(encoding="utf-8"))
    write_json(target / "DONE.json", {**marker, "config_hash": hash_of(wanted)})


def _values(key: str, text: str) -> list:
    """The values of ``text``: TOML's, where commas may stand in strings and lists; else words
    without quotes between commas."""
    try:
        return [_leaf(parse_set(f"{key}={in_toml(value)}")) for value in tomllib.loads(f"all = [{text}]")["all"]]
    except (tomllib.TOMLDecodeError, TypeError):
        return [_leaf(parse_set(f"{key}={value.strip()}")) for value in text.split(",") if value.strip()]


def in_toml(value) -> str:
    """The value as --set takes it, on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(in_toml, value))}]"
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML's, too
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _leaf(value):
    while isinstance(value, dict):
        value = next(iter(value.values()))
    return value


def _words(values: list[dict]) -> str:
    """On one line, also of texts with line breaks."""
    return "; ".join(", ".join(f"{key}={json.dumps(value)}" for key, value in one.items()) for one in values)


def main(arguments: list[str]) -> int:
    """The elements one after the other, in the background."""
    ended = usage(arguments, "launcher.submit.sweep", "SWEEP STAGE...", __doc__)
    if ended is not None:
        return ended
    folder = Path(arguments[0])
    return run_here(folder, [elements(folder)[0].stages[name] for name in arguments[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
