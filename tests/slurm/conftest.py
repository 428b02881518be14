"""One real Slurm cluster for the whole session, in a folder of its own, started by slurm/dev/up as a user would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.launcher.stub_project import ROOT, Project


@pytest.fixture(scope="session")
def slurm():
    """Environment of the cluster: {"SLURM_CONF": ...}. Skipped where Slurm is not installed; with CI=true that is a failure."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if any(shutil.which(program, path=path) is None for program in ("sbatch", "slurmctld", "slurmd", "munged")):
        reason = "Slurm is not installed: apt-get install slurmctld slurmd slurm-client munge"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="convoy-"))
    environment = {**os.environ, "CONVOY_DEV": str(folder), "CONVOY_DEV_KILL_WAIT": "3"}
    try:
        with open(folder / "up.out", "w+") as out:  # not a pipe: a daemon that kept it open would hang the test
            started = subprocess.run([ROOT / "slurm/dev/up"], env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=120)
            out.seek(0)
            said = out.read()
        assert started.returncode == 0, said
        yield {"SLURM_CONF": re.search(r"^export SLURM_CONF=(.*)$", said, re.MULTILINE)[1]}
    finally:
        subprocess.run([ROOT / "slurm/dev/down", "--wipe"], env=environment, timeout=60)


@pytest.fixture
def queue(slurm):
    """Call a Slurm command on the session's cluster -> its standard output."""
    def call(*command: str) -> str:
        done = subprocess.run(command, env={**os.environ, **slurm}, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return call


@pytest.fixture
def project(slurm, queue, tmp_path):
    """A project with stub stages whose commands reach the session's cluster; its jobs are cancelled at the end."""
    made = Project(tmp_path, slurm)
    yield made
    if (made.run / "config.json").exists():
        made.convoy("cancel", "demo")
