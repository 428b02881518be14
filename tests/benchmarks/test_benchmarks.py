"""The benchmarks of training run, at a size where their numbers mean nothing; on a GPU they say how
fast and how right we are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.training import ppo, train

ROOT = Path(__file__).parents[2]


def lines(script: str, *arguments: str) -> list[dict]:
    made = subprocess.run(
        [sys.executable, ROOT / "benchmarks/training" / script, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MASTER_PORT": "29471", "OMP_NUM_THREADS": "1"},
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]


def test_training_beside_hugging_face_and_the_fast_paths_beside_the_plain_ones():
    found = lines("train.py", "--small", "--one", "--parts", "ours", "shapes", "packed", "forward", "theirs")
    assert [row["part"] for row in found] == ["ours", "shapes", "packed", "forward", "forward", "theirs"]
    ours, theirs = found[0]["losses"], found[-1]["losses"]
    assert ours[-1] < ours[0] and theirs[-1] < theirs[0] and abs(ours[0] - theirs[0]) < 0.3, (
        "the same tokens, other random weights"
    )
    checks = lines("check.py", "--rows", "packed")
    assert all(row["ok"] for row in checks)
    assert {row["check"] for row in checks} == {"head", "gelu", "optimizer kernel", "optimizer", "layers"}


def test_ppo_s_iterations_and_their_parts():
    start, first = lines("ppo.py", "--small", "--one", "--parts", "ours", "--iterations", "1")
    assert start["part"] == "start" and first["iteration"] == 1 and first["kl"] == first["clip_fraction"] == 0
    assert set(first["parts"]) == {f"score {name}" for name in ("value", "reference", "policy", "reward")} | {
        "train value",
        "train policy",
        "swap",
    }


@pytest.mark.parametrize("script", [ppo, train])
def test_a_folder_that_is_missing_is_said_before_anything_runs(script, monkeypatch, tmp_path):
    """It was said after the first part, and the parent then waited for its time limit."""
    monkeypatch.setattr(sys, "argv", ["", "--small", "--out", str(tmp_path / "missing" / "file")])
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a part was started"))
    with pytest.raises(FileNotFoundError, match="missing"):
        script.main()
