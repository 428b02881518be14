"""PYTHONOPTIMIZE and python -O change nothing: guards stay, transformers loads, --help has its
text."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("launcher", "training", "conversion", "eval")
GUARDS = """
import torch
from training.generation.block_manager import Pages
from training.rl.invariants import samples_are_whole
from training.errors import InvariantError
assert False, "asserts are off"
batch = {"tokens": torch.tensor([[5, 6, 2]]), "response_mask": torch.tensor([[False, True, False]]), "lengths": torch.tensor([3])}
for guard in (lambda: samples_are_whole(batch, [1], torch.tensor([True]), (2,)), lambda: Pages(2, 8).allocate(3)):
    try:
        guard()
    except InvariantError as error:
        print(error)
"""


def run(level: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONOPTIMIZE": level}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_no_guard_is_an_assert():
    """``python -O`` leaves asserts out."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_guards_hold_without_asserts():
    done = run("1", "-c", GUARDS)
    assert "response_mask is True from 1 to 1" in done.stdout and "3 pages needed, 2 of 2" in done.stdout, done.stderr


@pytest.mark.parametrize("module", ["launcher", "eval.mtbench"])
def test_help_is_the_same_text(module):
    assert run("2", "-m", module, "--help").stdout == run("0", "-m", module, "--help").stdout
    assert run("0", "-OO", "-m", module, "--help").stdout == run("0", "-m", module, "--help").stdout


def test_a_piece_of_the_chain_runs_at_the_highest_level(folders, tmp_path):
    """Conversion and evaluation as they are typed by hand."""
    done = run("2", "-m", "conversion.hf_to_megatron", str(folders["sft"]), str(tmp_path / "convert"))
    assert done.returncode == 0 and (tmp_path / "convert/latest").read_text() == "0\n", done.stderr
    done = run(
        "2", "-m", "eval.mtbench", f"sft={folders['sft']}", "--output", str(tmp_path / "out"), "--max-new-tokens", "2"
    )
    assert done.returncode == 0 and (tmp_path / "out/report.html").is_file(), done.stderr
