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
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checks import disk
from launcher.config.sections import parse_set, tomllib
from launcher.config.stages import prepare_config
from launcher.run.folder import SWEEP, Run, hash_of, sweep_of, write_json
from launcher.slurm import transaction
from launcher.submit import create as submit
from launcher.submit.job_array import array_script, format_values
from training.errors import ConfigError

MOST = 1000
"""Elements; MaxArraySize of Slurm is 1001 unless the site says otherwise."""
SAME_FOR_ALL = ("model", "resources")
"""Sections that no element may change: an array asks for the same nodes and time for all."""


@dataclass(frozen=True)
class Sweep:
    """A sweep that passed its checks; nothing is written yet."""

    folder: Path
    identity: str
    values: list[dict]
    plans: list[submit.Plan]


def plan(request: submit.SubmitRequest, texts: Sequence[str]) -> Sweep:
    """``texts``: the values of --sweep. Raises a ConfigError with every mistake."""
    refuse_set_twice(texts, request.sets)
    name = request.recipe if request.name is None else request.name
    folder, values = request.runs / name, combinations(texts)
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} is a run, not a sweep; give the sweep another --name")
    submitted = sweep_of(folder) if (folder / SWEEP).exists() else None
    if submitted and submitted["values"] != values:
        raise ConfigError(
            f"{folder} was submitted with another sweep: {format_values(submitted['values'])}; "
            "give the new one another --name, or repeat the old one's --sweep"
        )
    identity = submitted["id"] if submitted else f"{name}-{secrets.token_hex(4)}"
    plans = [_plan_element(request, folder, identity, index, values[index]) for index in range(len(values))]
    first = plans[0].checked
    try:
        disk.check({str(index): sum(plan.checked.disk.values()) for index, plan in enumerate(plans)}, folder)
    except ConfigError as error:
        if not first.mistakes:  # else the plan is shown with them
            raise
        first.mistakes.append(str(error))
    return Sweep(folder, identity, values, plans)


def _plan_element(request: submit.SubmitRequest, folder: Path, identity: str, index: int, values: dict) -> submit.Plan:
    sets = (*request.sets, *(f"{key}={in_toml(value)}" for key, value in values.items()))
    plan = submit.plan(dataclasses.replace(request, runs=folder, name=str(index), sets=sets))
    run = {**plan.identity, "id": f"{identity}.{index}", "sweep": {"id": identity, "index": index}}
    return dataclasses.replace(plan, identity=run)


def scripts(sweep: Sweep) -> dict[str, str]:
    """Stage -> text of its array's batch script, as it will be queued; writes nothing."""
    runs = [submit.Draft(plan) for plan in sweep.plans]
    return {
        stage.name: array_script(sweep.folder, sweep.identity, stage, runs, sweep.values)
        for stage in sweep.plans[0].stages
    }


def combinations(texts: Sequence[str]) -> list[dict]:
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
                f"--sweep {text}: all elements of a job array share "
                f"section {section}; make runs of their own, by --name"
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


def create(sweep: Sweep) -> Path:
    """Write the sweep's folder and those of its runs; data that is the same for all is prepared
    once. Repeating it changes nothing."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with transaction.patient(Run(sweep.folder).lock):
        for plan in sweep.plans:
            if plan is not sweep.plans[0]:
                _share_data(sweep.plans[0], plan)
            submit.prepare_first(plan)
        write_json(sweep.folder / SWEEP, {"id": sweep.identity, "values": sweep.values})
        for plan in sweep.plans:
            submit.create(plan)
    return sweep.folder


def _share_data(first: submit.Plan, other: submit.Plan) -> None:
    """Copy the prepared data of ``first`` where ``other`` would prepare the same."""
    configs = [dataclasses.asdict(prepare_config(plan.run.folder, plan.tables)) for plan in (first, other)]
    target = other.run.folder / "data"
    same = {**configs[0], "paths": None} == {**configs[1], "paths": None}
    if not same or (target / "DONE.json").exists():
        return
    for name in ("model", "data"):
        if (first.run.folder / name).exists():
            shutil.copytree(first.run.folder / name, other.run.folder / name, dirs_exist_ok=True)
    marker = json.loads((first.run.folder / "data" / "DONE.json").read_text(encoding="utf-8"))
    write_json(target / "DONE.json", {**marker, "config_hash": hash_of(configs[1])})


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
