"""lm-evaluation-harness on the exported folders, where it is installed (pip install -e .[harness]):
benchmarks that need no judge.

It runs as a process of its own, ``python -m lm_eval``, in the folder of the tasks, so that they
name local data by paths from there. What it finds is kept under harness/ with the key of what it
depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from eval.config import MTBenchConfig
from eval.errors import DataError, HarnessError
from eval.files import fingerprint
from eval.files.jsonl import write
from eval.judge import children
from eval.report.run_folder import read_json


def tasks(config: MTBenchConfig) -> list[str]:
    return [task.strip() for task in config.harness_tasks.split(",") if task.strip()]


def require(config: MTBenchConfig) -> None:
    """Raise DataError where the harness is asked for and can't run: before hours of generation, not
    after."""
    if not tasks(config):
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise DataError(
            f"mtbench.harness_tasks = {config.harness_tasks!r}: lm-evaluation-harness is not installed beside "
            f"{sys.executable}; install the extra there: pip install -e '.[harness]'"
        )
    if config.harness_folder and not Path(config.harness_folder).is_dir():
        raise DataError(
            f"mtbench.harness_folder = {config.harness_folder}: no such folder; expected one with the tasks' YAML files"
        )
    for name, folder in config.paths.models.items():
        if "," in str(folder) or "=" in str(folder):
            raise DataError(f"paths.models.{name} = {folder}: lm-evaluation-harness can't take a path with ',' or '='")


def run(config: MTBenchConfig, fingerprints: dict[str, str]) -> dict[str, dict] | None:
    """Model -> task -> metric -> {"value", "stderr"}, None where no task is asked for; raises
    HarnessError with its last words."""
    task_names = tasks(config)
    if not task_names:
        return None
    return {
        name: _model(config, name, folder, fingerprints[name], task_names)
        for name, folder in config.paths.models.items()
    }


def _model(config: MTBenchConfig, name: str, folder: str, mark: str, task_names: list[str]) -> dict:
    folder_of_tasks = str(Path(config.harness_folder).resolve()) if config.harness_folder else ""
    tasks_mark = fingerprint.of_folder(folder_of_tasks) if folder_of_tasks else ""
    parts = [mark, task_names, folder_of_tasks, tasks_mark, config.harness_limit, config.seed, _version()]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    output = Path(config.paths.output).resolve() / "harness"
    stored = output / f"{name}.json"
    if (known := read_json(stored)).get("key") == key and isinstance(known.get("results"), dict):
        return known["results"]
    raw = output / f"{name}-{key}"
    done = subprocess.run(
        command(config, folder, task_names, raw),
        cwd=folder_of_tasks or None,
        env=children.environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    write(output / f"{name}.log", done.stdout + done.stderr)
    files = sorted(raw.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if done.returncode or not files:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise HarnessError(
            f"lm_eval of {name}: exit code {done.returncode}, it said last: {lines[-1].strip()[:300]!r} "
            f"(all of it: {output / f'{name}.log'})"
        )
    results = read(json.loads(files[-1].read_text(encoding="utf-8")))
    write(stored, json.dumps({"key": key, "results": results}, indent=1) + "\n")
    return results


def _version() -> str:
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        return ""


def command(config: MTBenchConfig, folder: str, task_names: list[str], output: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={Path(folder).resolve()}",
        "--tasks",
        ",".join(task_names),
        "--batch_size",
        str(config.batch_size),
        "--seed",
        str(config.seed),
        "--output_path",
        str(output),
        *(["--include_path", "."] if config.harness_folder else []),
        *(["--limit", str(config.harness_limit)] if config.harness_limit else []),
    ]


def read(raw: dict) -> dict:
    """The harness's results ({"acc,none": .., "acc_stderr,none": ..}) by task and metric, with the
    number of examples."""
    results = {}
    for task, values in raw["results"].items():
        metrics = {}
        for name, value in values.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and kind:
                error = values.get(f"{metric}_stderr,{kind}")
                metrics[metric if kind == "none" else f"{metric} ({kind})"] = {
                    "value": value,
                    "stderr": error if isinstance(error, int | float) else None,
                }
        results[task] = {"metrics": metrics, "examples": raw.get("n-samples", {}).get(task, {}).get("effective")}
    return results
