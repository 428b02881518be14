"""What the scripts of this folder share: settings by stage, the launcher's submit command and the
metrics that a stage logged."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path


def for_stages(stages: Iterable[str], **values: object) -> dict[str, object]:
    """The same values for several stages: {"sft.lr": 1e-5, "reward.lr": 1e-5, ...}."""
    return {f"{stage}.{key}": value for stage in stages for key, value in values.items()}


def one_gpu_each(stages: Iterable[str]) -> dict[str, object]:
    return {f"resources.{stage}.gpus_per_node": 1 for stage in stages}


def settings_text(settings: Mapping[str, object]) -> list[str]:
    """["sft.lr=1e-05", ...] as ``--set`` takes them."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in settings.items()]


def submit(recipe: str, profile: str, name: str, settings: Iterable[str], *options: str) -> list[str]:
    """The launcher's command that runs the pipeline and waits for its end."""
    command = [sys.executable, "-m", "launcher", "submit", "full-pipeline", "--recipe", recipe, "--profile", profile]
    sets = [argument for setting in settings for argument in ("--set", setting)]
    return [*command, "--name", name, *options, "--wait", *sets]


def metric(run: Path, stage: str, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of each line of a stage's metrics.jsonl that has the metric."""
    lines = (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["iteration"], row[name]) for row in rows if row.get(name) is not None]
