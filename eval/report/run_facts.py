"""Where a run's time and memory went, what distinguishes runs' configurations, and where everything
came from. Pure."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence

from eval.files.foreign import fits, number, tables, whole_number
from eval.report.curves import MEMORY, SECONDS, TOKENS
from eval.report.run_folder import Run, StageFolder, read_json

_NAMES_OF_A_RUN = ("run.name", "run.id", "run.folder", "run.recipe")


def stage_rows(run: Run) -> list[dict]:
    """One row a stage: {"name", "state", "iterations", "attempts", "seconds", "ranks",
    "rank_hours", "tokens_per_second", "memory_gb", "phases": {name: {"seconds": mean of an
    iteration, "tokens_per_second": median, "memory_gb": peak}}}; what isn't known is None."""
    return [_stage_row(stage, run.config) for stage in run.stages]


def _stage_row(stage: StageFolder, config: Mapping) -> dict:
    values = numbers(stage.metrics)
    ranks = _ranks(tables(config.get("resources")).get(stage.name))
    memory = [max(by_name) for name, by_name in values.items() if re.search("(^|_)gb(_|$)", name)]
    phases = {
        name.removeprefix(SECONDS): {
            "seconds": statistics.fmean(by_name),
            "tokens_per_second": _of(statistics.median, values.get(name.replace(SECONDS, TOKENS))),
            "memory_gb": _of(max, values.get(name.replace(SECONDS, MEMORY))),
        }
        for name, by_name in values.items()
        if name.startswith(SECONDS)
    }
    return {
        "name": stage.name,
        "state": stage.status.get("state"),
        "attempts": len(stage.attempts) or None,
        "seconds": stage.seconds,
        "iterations": stage.status.get("iteration"),
        "ranks": ranks,
        "rank_hours": stage.seconds * ranks / 3600 if stage.seconds is not None and ranks else None,
        "tokens_per_second": _of(statistics.median, values.get("tokens_per_second")),
        "memory_gb": _of(max, memory),
        "phases": phases,
    }


def _of(measure: Callable[[Sequence[float]], float], values: Sequence[float] | None) -> float | None:
    return measure(values) if values else None


def language_models(run: Run) -> dict[str, dict]:
    """Stage -> {"loss", "unigram"} of each that measured its held-out loss against the entropy of
    single tokens, its floor."""
    by_name = {stage.name: numbers(stage.metrics) for stage in run.stages}
    return {
        name: {"loss": values["heldout_loss"][-1], "unigram": values["unigram_entropy"][-1]}
        for name, values in by_name.items()
        if values.get("heldout_loss") and values.get("unigram_entropy")
    }


def numbers(rows: Sequence[Mapping]) -> dict[str, list[float]]:
    """Name -> its values in order."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and (isinstance(value, float) or fits(value, number))
            ):
                by_name.setdefault(name, []).append(value)
    return by_name


def _ranks(resources: Mapping | None) -> int | None:
    requested = [tables(resources).get(name) for name in ("nodes", "gpus_per_node")]
    return requested[0] * max(1, requested[1]) if all(fits(one, whole_number) for one in requested) else None


def flat(config: Mapping, before: str = "") -> dict[str, object]:
    """{"sft.lr": 1e-5, ...} of nested tables."""
    by_name = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            by_name |= flat(value, f"{before}{key}.")
        else:
            by_name[before + key] = value
    return by_name


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of every key of config.json that isn't the same in all; a key
    that a run lacks is "-", and a section that one lacks is a single row."""
    sections = {name for run in runs for name in run.config}
    partly = {name for name in sections if any(name not in run.config for run in runs)}
    rows = [
        (name, [f"{len(flat({name: run.config[name]}))} keys" if name in run.config else "-" for run in runs])
        for name in partly
    ]
    tables = [flat({name: value for name, value in run.config.items() if name not in partly}) for run in runs]
    keys = {key for table in tables for key in table} - set(_NAMES_OF_A_RUN)
    rows += [(key, [written(table[key]) if key in table else "-" for table in tables]) for key in keys]
    return sorted((key, values) for key, values in rows if len(set(values)) > 1)


def written(value: object) -> str:
    """As in a TOML file, or nearly."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) else str(value)


def provenance(run: Run) -> list[tuple[str, str]]:
    """(name, value): run id, recipe, profile, and for each stage its manifest, its configuration's
    hash and what computed it."""
    about = tables(run.config.get("run"))
    rows = [(name, str(about[name])) for name in ("id", "recipe", "profile") if about.get(name)]
    manifests = {stage.name: stage.manifest for stage in run.stages if stage.manifest}
    versions = {
        name: ", ".join(f"{package} {version}" for package, version in tables(done.get("versions")).items())
        for name, done in manifests.items()
    }
    same = len(set(versions.values())) == 1
    for name, done in manifests.items():
        hashes = [
            f"{word} {str(done[key])[:12]}"
            for word, key in (("manifest", "identity"), ("configuration", "config_hash"))
            if done.get(key)
        ]
        files = f"{len(tables(done.get('outputs')))} files by sha256"
        rows.append((name, "; ".join([*hashes, files, *([] if same else [versions[name]])])))
    return rows + ([("computed by", next(iter(versions.values())))] if same else []) + data(run)


def data(run: Run) -> list[tuple[str, str]]:
    """What was dropped and cut of the run's rows, as the launcher wrote it when they were
    prepared."""
    lines = read_json(run.folder / "data" / "summary.json").get("lines")
    return [("rows", line) for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
