"""Shared fixtures. One thread a rank: the machine may have two cores, and sums then have one order."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items):
    """Under pytest-xdist (--dist loadgroup) tests that share a cluster or a session's fixtures stay on one worker: Slurm's mostly wait,
    so that the other worker has a core for itself."""
    for item in items:
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        item.add_marker(pytest.mark.xdist_group("slurm" if folder == "slurm" else str(item.path)))
