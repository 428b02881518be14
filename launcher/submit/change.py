"""A changed configuration of a run: what is asked for, what follows from it for each stage, and how
it is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from launcher.checks import plan_checks
from launcher.config.sections import Profile, check_sections, differences, merge, parse_set, read_toml
from launcher.config.stages import Stage, full_tables, stage_config
from launcher.run import manifest
from launcher.run.folder import Run, write_json
from launcher.submit.create import write_stage_config
from launcher.submit.rewind import descendants, has_work, renew_descendants, rewind
from training.config.schema import build
from training.errors import ConfigError


@dataclass(frozen=True)
class Wish:
    """What ``resume`` was asked for."""

    first: str | None = None
    """Stage that starts over, or at ``iteration``; and all that was built from it."""
    iteration: int | None = None
    """Saved iteration to go on from; of ``first``, else of the first stage that is not done."""
    files: tuple[Path, ...] = ()
    sets: tuple[str, ...] = ()
    profile: Profile | None = None
    take_over: bool = False
    last: str | None = None
    """Last stage that is to run; None: as the run was submitted."""
    everything: bool = False
    """Run all stages, however the run was submitted."""


@dataclass
class Change:
    """A new configuration of a run and what follows from it."""

    tables: dict
    profile: dict
    stages: list[Stage]
    """Those that are to run, done ones among them."""
    target: Stage | None = None
    """The stage that goes back: to its beginning, or to ``Wish.iteration``."""
    lines: list[str] = field(default_factory=list)
    """The keys that differ, then what happens."""
    restarted: list[str] = field(default_factory=list)
    """Stages that start over, with all that was built from them."""
    uncertified: list[str] = field(default_factory=list)
    """Stages that are not done any more but keep what they have."""

    @property
    def site(self) -> Profile:
        return build(Profile, self.profile, "profile")


def examine(run: Run, wish: Wish) -> Change:
    """The configuration that is wished for, checked, next to the present one; its ``lines`` are
    empty where nothing differs."""
    config = run.config
    layers = [(read_toml(path), str(path)) for path in wish.files] + [
        (parse_set(text), f"--set {text}") for text in wish.sets
    ]
    for tables, where in layers:
        check_sections(tables, where)
    old = run.tables
    profile = config["profile"] if wish.profile is None else dataclasses.asdict(wish.profile)
    tables = full_tables(run.folder, merge(old, *(tables for tables, _ in layers)), run.stages)
    change = Change(tables, profile, selected(run, wish), _target(run, wish))
    keys = differences(old, change.tables) + differences({"profile": config["profile"]}, {"profile": profile})
    if keys:
        left = {stage.name for stage in unfinished(run)}
        plan_checks.check(
            run.folder, tables, run.stages, [stage for stage in change.stages if stage.name in left], change.site
        )
        change.lines = [*keys, *_consequences(run, old, change, wish)]
    return change


def selected(run: Run, wish: Wish) -> list[Stage]:
    """The stages that are to run: those that the run was submitted for, unless ``wish`` says
    others, and what they need."""
    names = list(run.stages)
    if wish.everything and wish.last:
        raise ConfigError("--until and --all contradict each other: leave one out")
    if wish.last:
        last = names.index(run.stage_named(wish.last).name)
        if wish.first and names.index(run.stage_named(wish.first).name) > last:
            raise ConfigError(f"--from {wish.first} comes after --until {wish.last}; the order is {' -> '.join(names)}")
        return [run.stages[name] for name in names[: last + 1]]
    return list(run.stages.values()) if wish.everything else run.selected()


def unfinished(run: Run) -> list[Stage]:
    """Stages that are not done; all, where a manifest is damaged: ``heal`` mends it when the checks
    are through."""
    try:
        return manifest.left(run, list(run.stages.values()))
    except manifest.Refused:
        return list(run.stages.values())


def _target(run: Run, wish: Wish) -> Stage | None:
    if wish.first:
        return run.stage_named(wish.first)
    left = unfinished(run)
    if wish.iteration is not None and not left:
        raise ConfigError(
            f"--load-iteration {wish.iteration} of which stage? all are done; add --from, one of "
            f"{', '.join(run.stages)}"
        )
    return None if wish.iteration is None else left[0]


def apply(run: Run, change: Change) -> list[str]:
    """Write the change, and take back what it makes invalid; what was done, in words."""
    config, names, messages = run.config, [stage.name for stage in change.stages], []
    identity = {**config["run"], "profile": change.profile["name"], "selected": names}
    if [stage.name for stage in run.selected()] != names:
        messages.append(f"stages of this run from now on: {', '.join(names)}")
    if change.lines or messages:
        write_json(run.config_file, {**config, "run": identity, "profile": change.profile, **change.tables})
        run.record("changed", lines=[*change.lines, *messages])
    if not change.lines:
        return messages
    for name in change.restarted:
        messages += rewind(run, run.stages[name], None)
    for name in run.stages:
        write_stage_config(run, name)
        done = run.stage(name) / "DONE.json"
        if name in change.uncertified and done.exists():
            run.record("rewound", stage=name, iteration=run.iteration(name))
            run.set_aside(done)
            messages += renew_descendants(run, run.stages[name])
    return messages


def _consequences(run: Run, old: dict, change: Change, wish: Wish) -> list[str]:
    """What each stage makes of the change, in words; fills ``restarted`` and ``uncertified``."""
    lines, target = [], change.target
    for name, stage in run.stages.items():
        before, after = (_read_by(run, tables, stage) for tables in (old, change.tables))
        over = [*change.restarted, *([target.name] if target else [])]
        if not has_work(run, stage) or any(stage in descendants(run, run.stages[other]) for other in over):
            continue  # it hasn't begun, or starts over with what it is made from
        back = stage is target
        if not back and before == after:
            continue
        later = [each.name for each in descendants(run, stage) if has_work(run, each)]
        so = f", and so does what was made from it: {', '.join(later)}" if later else ""
        may = _keeps(run, stage, before, after)
        if back and wish.iteration is not None and before.get("data") != after.get("data"):
            raise ConfigError(
                f"--load-iteration {wish.iteration}: {name} was trained on other rows than the "
                "changed section data gives; leave out --load-iteration, or what changes the data"
            )
        if (back and wish.iteration is None) or not (back or may):
            change.restarted += [] if back else [name]
            why = " (--from; without it, it keeps what it has)" if back and may else ""
            lines.append(f"=> {name} starts over{why}{so}; what {'they' if later else 'it'} had is kept aside")
            continue
        change.uncertified.append(name)
        where = f"iteration {wish.iteration if back else run.iteration(name)}" if stage.checkpoints else "what it has"
        so = (
            f"; what was made from it starts over: {', '.join(later)}"
            if later and (back or _is_done(run, name))
            else ""
        )
        lines.append(f"=> {name} goes on from {where}, with the new values{so}")
    return lines or ["=> the stages that are left run with it"]


def _read_by(run: Run, tables: dict, stage: Stage) -> dict:
    """What a stage is made from: its own section, and of a trainer what its rows are."""
    own = dataclasses.asdict(stage_config(run.folder, tables, run.stages, stage.name))
    return {**own, "data": tables["data"]} if stage.trainer else own


def _keeps(run: Run, stage: Stage, before: dict, after: dict) -> bool:
    """Whether a stage may go on from what it has under the new values."""
    at, only = run.iteration(stage.name), {key for key in after if before[key] != after[key]}
    if "data" in only:
        return False
    longer = stage.trainer and only <= {"iterations"} and (at or 0) < after["iterations"]
    return bool(stage.evaluation or longer or (stage.trainer and not _is_done(run, stage.name)))


def _is_done(run: Run, stage: str) -> bool:
    return (run.stage(stage) / "DONE.json").exists()
