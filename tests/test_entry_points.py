"""Whatever can be started says by --help what it is, and starts nothing."""

import os
import pty
import subprocess
import sys

import pytest

from tests.support.programs import programs
from tests.support.stub_project import ROOT, Project

LIGHT = [
    "launcher.job.supervise",
    "launcher.submit.local",
    "launcher.submit.start_sweep",
    "launcher.slurm.transaction",
    "launcher.slurm.node_probe",
    "launcher.job.node_check",
    "training.data.prepare",
    "training.data.peek",
    "eval.mtbench",
]
HEAVY = ["training.sft", "eval"]
"""They import torch: one of each kind; ``test_every_program_has_a_way_to_help`` reads the
others."""
SCRIPTS = ["slurm/dev/up", "slurm/dev/down", "slurm/container/install.sh"]


def test_every_program_has_a_way_to_help():
    ways = (
        "--help",
        "usage(",
        "argparse",
        "run_stage(",
        "arguments()",
        "from launcher.cli import",
        "import main",
        "import heed_signals, main",
    )
    found = programs()
    assert set(found) >= {*LIGHT, *HEAVY} - {"eval"} | {"eval.__main__"}
    assert [name for name, text in found.items() if not any(way in text for way in ways)] == []


@pytest.mark.parametrize(
    "command",
    [*([sys.executable, "-m", name] for name in LIGHT + HEAVY), *([ROOT / name] for name in SCRIPTS)],
    ids=lambda command: str(command[-1]).rpartition("/")[2],
)
def test_help_starts_nothing(command, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CONVOY_DEV": str(tmp_path / "dev")}
    done = subprocess.run(
        [*command, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and len(done.stdout) > 50, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not any(tmp_path.iterdir()), "nothing is written"


@pytest.mark.parametrize(
    "command",
    [
        ["launcher.job.supervise"],
        ["training.data.prepare", "nowhere.json"],
        ["training.data.peek"],
        ["launcher.submit.start_sweep"],
        ["training.data.prepare", "a", "b"],
    ],
)
def test_wrong_arguments_are_64(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 64 and "Traceback" not in done.stderr and done.stderr.strip(), done.stderr


@pytest.mark.parametrize("columns", [None, "0"])
def test_a_terminal_without_a_width_shows_the_run(project, columns):
    """A new pseudo terminal says 0 x 0, as an editor's or a job's does."""
    if columns is not None:
        project.environment["COLUMNS"] = columns
    reader, terminal = pty.openpty()
    running = subprocess.Popen(
        project.command(
            "submit", "full-pipeline", "--name", "demo", "--profile", "local", "--until", "convert", "--wait"
        ),
        cwd=project.folder,
        env=project.environment,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.STDOUT,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(reader, 65536)
        except OSError:  # its other end is closed
            break
    os.close(reader)
    assert running.wait(60) == 0 and b"Traceback" not in shown and b"convert done" in shown, shown[-2000:].decode()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)
