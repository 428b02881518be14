"""From a command line to a run folder: merge, check, prepare the data."""

from __future__ import annotations

import dataclasses
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.checks import plan_checks
from launcher.config.sections import Profile, Resources, build_plain, differences, layered
from launcher.config.stages import ALL, FULL, PIPELINES, Graph, Stage, full_tables, sections, select, stage_config
from launcher.run import manifest
from launcher.run.folder import Run, lock, write_json, write_text
from launcher.slurm import script, transaction
from launcher.status import state
from launcher.status.terminal import say
from launcher.submit import prepared, reuse
from training.errors import ConfigError, Mistakes

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")


@dataclass(frozen=True)
class SubmitRequest:
    """What the command line of ``submit``, ``plan`` and ``render`` asks for."""

    target: str
    """A stage, or "full-pipeline"."""
    recipe: str
    runs: Path
    """Folder of all runs; of a sweep's element, the sweep's folder."""
    profile: Profile
    profile_reason: str
    """Why this profile."""
    name: str | None = None
    """None: the recipe's."""
    files: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    first: str | None = None
    last: str | None = None
    pipeline: str | None = None
    """None: the run's, else the first that has the target."""
    reused: Run | None = None
    """A run whose finished stages are taken (launcher/submit/reuse.py)."""
    tolerant: bool = False
    """A plan can be shown in spite of the mistakes in ``checked.mistakes``."""


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
    checked: plan_checks.CheckResult | None
    """None where ``resume`` plans: it has checked by itself what changes."""
    identity: dict
    """Section ``run`` of the run's config.json."""
    reused: Run | None = None
    """The run whose finished stages are taken (launcher/submit/reuse.py)."""

    @property
    def graph(self) -> Graph:
        return PIPELINES[self.identity["pipeline"]]

    def resources(self, stage: Stage) -> Resources:
        return getattr(build_plain("resources", self.tables["resources"]), stage.name)

    def config(self) -> dict:
        """What config.json of the run will hold."""
        return {"run": self.identity, "profile": dataclasses.asdict(self.profile), **self.tables}


class Draft(Run):
    """A run as it will be once its config.json is written."""

    def __init__(self, plan: Plan):
        super().__init__(plan.run.folder)
        self.plan = plan

    @property
    def config(self) -> dict:
        return self.plan.config()


def plan(request: SubmitRequest) -> Plan:
    """Merge and check. Raises a ConfigError with every mistake that can be seen before anything is
    written."""
    name = request.recipe if request.name is None else request.name
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r}: a run's name has letters, digits, '.', '_' and '-' only, begins with a letter or digit "
            "and is at most 61 long"
        )
    run = Run(request.runs / name)
    exists = run.config_file.exists()
    began = exists and _began(run)
    pipeline = request.pipeline or _default_pipeline(run, request.target)
    if began and pipeline != run.pipeline:
        raise ConfigError(
            f"{run.folder} was submitted with --pipeline {run.pipeline}; give {pipeline} its own run with --name"
        )
    graph = PIPELINES[pipeline]
    stages = select(graph, request.target, request.first, request.last)
    _check_sets(request.sets, pipeline)
    layers = layered(request.recipe, list(request.files), list(request.sets), request.profile)
    tables = _full_tables(run.folder, layers, graph)
    checked = plan_checks.check(run.folder, tables, graph, stages, request.profile, request.tolerant)
    if began:
        _check_same(run, tables, request.profile)
        prepared.check(run)
    done = _done_stages(run, graph) if began else set()
    if request.reused:
        done |= set(reuse.candidates(request.reused, run.folder, tables, graph))
    parents = Mistakes()
    parents.of(plan_checks.check_parents, graph, stages, done)
    if parents.messages and not request.tolerant:
        raise ConfigError(*parents.messages)
    checked.mistakes.extend(parents.messages)
    identity = {
        "name": name,
        "id": run.id if exists else f"{name}-{secrets.token_hex(4)}",
        "recipe": request.recipe,
        "profile": request.profile.name,
        "pipeline": pipeline,
        "folder": str(run.folder),
        "selected": [stage.name for stage in stages],
    }
    site = request.profile, request.profile_reason
    return Plan(run, tables, request.recipe, stages, *site, checked, identity, request.reused)


def _default_pipeline(run: Run, target: str) -> str:
    """The run's, else the first that has the target."""
    if run.config_file.exists():
        return run.pipeline
    return next(name for name, graph in PIPELINES.items() if target in (FULL, *graph))


def _done_stages(run: Run, graph: Graph) -> set[str]:
    return set(graph) - {stage.name for stage in manifest.left(run, list(graph.values()))}


def _full_tables(run: Path, tables: dict, graph: Graph) -> dict:
    """The sections with their defaults; ConfigError for all that is wrong in them, and in the
    data and model that they name."""
    try:
        return full_tables(run, tables, graph)
    except ConfigError as error:
        mistakes = plan_checks.check_sources(run, tables)
        raise ConfigError(*dict.fromkeys([*error.messages, *mistakes.messages])) from None


def create(plan: Plan) -> Run:
    """Prepare the data and write the run folder's configuration; repeating it changes nothing.
    Waits for another command that does so.

    Nothing but the prepared data is written before the last check.
    """
    with transaction.patient(lambda: lock(plan.run.folder / ".prepare.lock")):
        return _write(plan, _check_before_writing(plan))


def prepare_first(plan: Plan) -> None:
    """Prepare the data of a run that has no configuration yet; ConfigError for bad data, and for
    a stage without rows."""
    with transaction.patient(lambda: lock(plan.run.folder / ".prepare.lock")):
        prepared.prepare(Draft(plan))
        prepared.check_rows(Draft(plan), plan.stages)


def _check_before_writing(plan: Plan) -> list[str]:
    """The stages that are taken from another run; ConfigError for all that stands against the
    plan."""
    run, draft = plan.run, Draft(plan)
    if run.config_file.exists():
        if run.config["run"]["profile"] != plan.profile.name and (busy := state.active_stages(run)):
            raise ConfigError(
                f"{', '.join(busy)} of {run.folder} is running or queued with profile "
                f"{run.config['run']['profile']}; "
                f"stop it first: python -m launcher cancel {run.folder}"
            )
        if _began(run):
            _check_same(run, plan.tables, plan.profile)
    prepared.prepare(draft)
    prepared.check_rows(draft, plan.stages)
    if not plan.reused:
        return []
    reusable = reuse.takeable(draft, plan.reused)
    plan_checks.check_parents(plan.graph, plan.stages, _done_stages(draft, plan.graph) | set(reusable))
    return reusable


def _write(plan: Plan, reusable: list[str]) -> Run:
    run, config = plan.run, plan.config()
    if run.config_file.exists():
        config["run"]["id"] = run.id  # another command may have been first since the plan was made
    write_json(run.config_file, config)
    for name in run.stages:
        write_stage_config(run, name)
        done = run.stage(name) / "DONE.json"
        if done.exists() and manifest.read(run, name)["config_hash"] != manifest.config_hash(run, name):
            run.set_aside(done)  # only what _check_same lets change: a judge, say
            print(f"{name}: its configuration changed; it runs again, and keeps what it has", flush=True)
    prepared.summarise(run, plan_checks.lengths(run.folder, run.config, run.stages, list(run.stages.values())))
    if plan.reused:
        reuse.take(run, plan.reused, reusable)
        say(f"taken from {plan.reused.folder}: {', '.join(reusable) or 'nothing: its rows are not those of this run'}")
    return run


def write_stage_config(run: Run, name: str) -> None:
    write_json(
        run.stage(name) / "config.json", dataclasses.asdict(stage_config(run.folder, run.config, run.stages, name))
    )


def render_all(plan: Plan) -> dict[str, str]:
    """Stage -> text of its batch script, as it will be queued; writes nothing."""
    run = Draft(plan)
    return {
        stage.name: script.script(script.stage_request(run, stage, plan.resources(stage), plan.profile))
        for stage in plan.stages
    }


def render_committed(folder: Path) -> list[Path]:
    """Write slurm/<stage>.sbatch: bloom-1b7's resources, no site; returns the files."""
    written = []
    for name, text in committed_scripts().items():
        write_text(folder / f"{name}.sbatch", text)
        written.append(folder / f"{name}.sbatch")
    return written


def committed_scripts() -> dict[str, str]:
    resources = build_plain("resources", layered("bloom-1b7", [], [])["resources"])
    return {
        name: script.script(script.committed_request(stage, getattr(resources, name))) for name, stage in ALL.items()
    }


def _began(run: Run) -> bool:
    """Whether a stage was ever queued or started; until then the configuration may still change."""
    return any(event["event"] in ("submitted", "runner", "started", "reused") for event in run.ledger())


def _check_sets(sets: Iterable[str], pipeline: str) -> None:
    """ConfigError for a --set that nothing of this pipeline reads. (A recipe or file may serve
    several.)"""
    for text in sets:
        parts = text.partition("=")[0].strip().split(".")
        stage = parts[1] if parts[0] == "resources" and len(parts) > 1 else parts[0]
        if stage in ALL and stage not in PIPELINES[pipeline]:
            right = next(name for name, graph in PIPELINES.items() if stage in graph)
            raise ConfigError(
                f"--set {text}: pipeline {pipeline} has no stage {stage} ({' -> '.join(PIPELINES[pipeline])}); "
                f"leave it out, or add --pipeline {right}"
            )


def _check_same(run: Run, tables: dict, profile: Profile) -> None:
    """ConfigError where a section differs that something was made from. Resources, the evaluation
    (which keeps the answers that it has) and stages that have not begun may change, unless they are
    queued: their jobs are what they were."""
    known = sections(run.stages)
    section_names = [
        name
        for name in known
        if name != "resources"
        and not (name in ALL and ALL[name].evaluation)
        and (name not in run.stages or run.status(name)["attempt"])
    ]
    changed = differences(*({name: config[name] for name in section_names} for config in (run.config, tables)))
    if changed:
        raise ConfigError(
            f"{run.folder} was submitted with another configuration:\n  "
            + "\n  ".join(changed)
            + "\ngive the new one its own run with --name, or go on with the old one: "
            + f"python -m launcher resume {run.folder}"
        )
    run.check_here()
    old = {"profile": run.config["profile"], **{name: run.config[name] for name in known}}
    changed = differences(old, {"profile": dataclasses.asdict(profile), **{name: tables[name] for name in known}})
    if changed and (busy := state.active_stages(run)):
        raise ConfigError(
            f"{', '.join(busy)} of {run.folder} is running or queued with another configuration:\n  "
            + "\n  ".join(changed)
            + f"\nstop it first (python -m launcher cancel {run.folder}), or give the new one its own run with --name"
        )
