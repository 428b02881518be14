"""The demo's files and model, made once for all data tests by the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def prepare():
    """Runs ``python -m training.data.prepare`` into a folder; gives the finished process."""

    def run(folder: Path, model: dict | None = None, **data) -> subprocess.CompletedProcess:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "paths": {"output": str(folder / "data"), "model": str(folder / "model")},
            "model": model or {},
            "data": data,
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return subprocess.run(
            [sys.executable, "-m", "training.data.prepare", str(folder / "config.json")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, prepare) -> Path:
    """A folder with the demo's ``data/`` and ``model/``, seed 0."""
    folder = tmp_path_factory.mktemp("demo")
    done = prepare(folder)
    assert done.returncode == 0, done.stderr
    return folder


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
