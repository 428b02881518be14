"""One real Slurm cluster for the whole session, in a folder of its own, started by slurm/dev/up as
a user would."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.support.stub_project import Project


@pytest.fixture(scope="session")
def slurm_installed():
    """Skips where Slurm is not installed; with CI=true that is a failure."""
    if missing("sbatch", "slurmctld", "slurmd", "munged"):
        reason = "Slurm is not installed: apt-get install slurmctld slurmd slurm-client munge"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def slurm(slurm_installed):
    """Environment of the cluster: {"SLURM_CONF": ...}."""
    with Cluster() as cluster:
        yield cluster.environment


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
    """A project with stub stages whose commands reach the session's cluster; its jobs are cancelled
    at the end."""
    made = Project(tmp_path, slurm)
    yield made
    if (made.run / "config.json").exists():
        made.convoy("cancel", "demo")
