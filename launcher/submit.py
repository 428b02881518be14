"""From a command line to a run folder: merge, check, prepare the data; take a finished stage back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import checks, manifest, sbatch, state
from launcher.config import SECTIONS, Profile, build_plain, differences, layered
from launcher.pipeline import STAGES, Stage, full_tables, prepare_config, select, stage_config
from launcher.run import Run, hash_of, iteration_folder, lock, write_json, write_text
from training.config import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


class Failed(RuntimeError):
    """Something outside the user's command line went wrong; the message says what and where to look."""


@dataclass(frozen=True)
class Plan:
    """A submission that passed its checks; nothing is written yet."""

    run: Run
    tables: dict
    recipe: str
    stages: list[Stage]
    profile: Profile
    reason: str
    """Why this profile."""

    def resources(self, stage: Stage):
        return getattr(build_plain("resources", self.tables["resources"]), stage.name)


def plan(target: str, recipe: str, files: list[Path], sets: list[str], name: str | None, runs: Path,
         chosen: tuple[Profile, str], first: str | None, last: str | None) -> Plan:
    """Merge and check; ConfigError for every mistake that can be seen now."""
    name = name or recipe
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name!r}: a run's name has letters, digits, '.', '_' and '-' only, begins with a letter or digit "
                          "and is at most 61 long")
    run, stages = Run(runs / name), select(target, first, last)
    tables = full_tables(run.folder, layered(recipe, files, sets))
    checks.check(run.folder, tables, stages, chosen[0])
    done: set[str] = set()
    if run.config_file.exists() and _begun(run):
        _check_same(run, tables)
        done = set(STAGES) - {stage.name for stage in manifest.left(run, list(STAGES.values()))}
    checks.check_parents(stages, done)
    return Plan(run, tables, recipe, stages, *chosen)


def create(made: Plan) -> Run:
    """Write the run folder's configuration and prepare its data; repeating it changes nothing. Busy while another command does so."""
    with lock(made.run.folder / ".prepare.lock"):
        return _create(made)


def _create(made: Plan) -> Run:
    run = made.run
    if run.config_file.exists() and run.config["run"]["profile"] != made.profile.name and (busy := _busy(run)):
        raise ConfigError(f"{', '.join(busy)} of {run.folder} is running or queued with profile {run.config['run']['profile']}; "
                          f"stop it first: python -m launcher cancel {run.folder}")
    old = run.config["run"]["id"] if run.config_file.exists() else f"{run.folder.name}-{secrets.token_hex(4)}"
    identity = {"name": run.folder.name, "id": old, "recipe": made.recipe, "profile": made.profile.name, "folder": str(run.folder)}
    write_json(run.config_file, {"run": identity, "profile": dataclasses.asdict(made.profile), **made.tables})
    for name in STAGES:
        write_stage_config(run, name)
        done = run.stage(name) / "DONE.json"
        if done.exists() and manifest.read(run, name)["config_hash"] != manifest.config_hash(run, name):
            run.set_aside(done)  # only what _check_same lets change: a judge, say
    prepare(run)
    return run


def write_stage_config(run: Run, name: str) -> None:
    write_json(run.stage(name) / "config.json", dataclasses.asdict(stage_config(run.folder, run.config, name)))


def prepare(run: Run) -> None:
    """Run ``training.data.prepare`` unless it has run with this configuration; ConfigError with its message for bad data."""
    config = dataclasses.asdict(prepare_config(run.folder, run.config))
    marker = run.folder / "data" / "DONE.json"
    if marker.exists():
        made = json.loads(marker.read_text(encoding="utf-8"))
        if made["config_hash"] == hash_of(config) and all((run.folder / "data" / name).exists() for name in made["files"]):
            return
    path = run.folder / "data" / "config.json"
    write_json(path, config)
    done = subprocess.run([sys.executable, "-m", "training.data.prepare", str(path)], capture_output=True, text=True, check=False)
    write_text(run.folder / "data" / "prepare.log", done.stdout + done.stderr)
    words = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
    if done.returncode in (os.EX_USAGE, os.EX_DATAERR):
        raise ConfigError(f"data preparation: {words}")
    if done.returncode:
        raise Failed(f"data preparation: exit code {done.returncode}: {words}; all it said: {run.folder / 'data' / 'prepare.log'}")
    files = sorted(path.name for path in (run.folder / "data").glob("*.jsonl"))
    write_json(marker, {"config_hash": hash_of(config), "files": files})


def take_up(run: Run, stage: str | None, iteration: int | None) -> None:
    """Check that a run can go on from here, and take ``stage`` back when one is named; ConfigError where that can't be."""
    run.check_here()
    if iteration is not None and stage is None:
        raise ConfigError(f"--iteration {iteration} of which stage? add --stage, one of {', '.join(STAGES)}")
    prepare(run)
    if stage is None:
        return
    if busy := _busy(run):
        raise ConfigError(f"{', '.join(busy)} of {run.folder} is running or queued; stop it first: python -m launcher cancel {run.folder}")
    rewind(run, STAGES[stage], iteration)


def _busy(run: Run) -> list[str]:
    """Stages that run or are queued."""
    return [row.stage for row in state.states(run)[0] if row.state in ("running", "pending", "requeued")]


def rewind(run: Run, stage: Stage, iteration: int | None) -> None:
    """Make ``stage`` run again, from ``iteration`` when one is given; what was built from it is moved aside whole.

    The checkpoint becomes the stage's ``latest`` and newer ones are moved to checkpoints.N, so that a later attempt of
    the same stage goes on from where it is then, not from this iteration once more.
    """
    present = run.checkpoint_iterations(stage.name)
    if iteration is not None and iteration not in present:
        shown = ", ".join(map(str, present)) or "none"
        raise ConfigError(f"--iteration {iteration}: {stage.name} of {run.folder} has no such checkpoint; present: {shown}")
    folder = run.stage(stage.name)
    run.record("rewound", stage=stage.name, iteration=iteration)
    if (folder / "DONE.json").exists():
        run.set_aside(folder / "DONE.json")
    if iteration is not None:
        write_text(folder / "latest", f"{iteration}\n")
        newer = [number for number in present if number > iteration]
        for number in newer:
            aside = folder / "checkpoints.aside"
            aside.mkdir(exist_ok=True)
            os.replace(folder / "checkpoints" / iteration_folder(number), _free(aside / iteration_folder(number)))
    for later in descendants(stage):
        if run.iteration(later.name) is not None or (run.stage(later.name) / "DONE.json").exists():
            _begin_again(run, later)


def render_all(made: Plan) -> dict[str, str]:
    """Stage -> text of its batch script; writes nothing."""
    run = made.run
    if not run.config_file.exists():
        return {stage.name: sbatch.script(sbatch.committed_request(stage, made.resources(stage))) for stage in made.stages}
    return {stage.name: sbatch.script(sbatch.stage_request(run, stage, made.resources(stage), made.profile)) for stage in made.stages}


def render_committed(folder: Path) -> list[Path]:
    """Write slurm/<stage>.sbatch: bloom-1b7's resources, no site; returns the files."""
    written = []
    for name, text in committed_scripts().items():
        write_text(folder / f"{name}.sbatch", text)
        written.append(folder / f"{name}.sbatch")
    return written


def committed_scripts() -> dict[str, str]:
    resources = build_plain("resources", layered("bloom-1b7", [], [])["resources"])
    return {name: sbatch.script(sbatch.committed_request(stage, getattr(resources, name))) for name, stage in STAGES.items()}


def _begun(run: Run) -> bool:
    """Whether a stage was ever queued or started; until then the configuration may still change."""
    return any(event["event"] in ("submitted", "runner", "started") for event in run.ledger())


def _check_same(run: Run, tables: dict) -> None:
    """ConfigError where a section differs that something was made from. Resources, the evaluation (which keeps the answers that it
    has) and stages that have not begun may change."""
    made = [name for name in SECTIONS if name not in ("resources", "mtbench") and (name not in STAGES or run.status(name)["attempt"])]
    changed = differences({name: run.config[name] for name in made}, {name: tables[name] for name in made})
    if changed:
        raise ConfigError(f"{run.folder} was submitted with another configuration:\n  " + "\n  ".join(changed) +
                          f"\ngive the new one its own run with --name, or go on with the old one: python -m launcher resume {run.folder}")
    run.check_here()


def move_stale_aside(run: Run, todo: list[Stage]) -> None:
    """A stage that has to run although it has a manifest was built from parents that are no more: it begins anew."""
    for stage in todo:
        if (run.stage(stage.name) / "DONE.json").exists():
            _begin_again(run, stage)


def _begin_again(run: Run, stage: Stage) -> None:
    aside = run.set_aside(run.stage(stage.name))
    run.record("set aside", stage=stage.name, folder=aside.name)
    write_stage_config(run, stage.name)


def descendants(stage: Stage) -> list[Stage]:
    found = {stage.name}
    for other in STAGES.values():
        if found & set(other.parents):
            found.add(other.name)
    return [other for other in STAGES.values() if other.name in found and other is not stage]


def _free(path: Path) -> Path:
    number = 0
    while (target := path.with_name(f"{path.name}.{number}") if number else path).exists():
        number += 1
    return target
