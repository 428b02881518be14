"""Shared fixtures. One thread a rank: the machine may have two cores, and sums then have one
order."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also tests marked slow (CHAOS_SLOW=1 does the same)")


def wants_slow(config) -> bool:
    return config.getoption("--slow") or os.environ.get("CHAOS_SLOW") == "1"


def pytest_collection_modifyitems(config, items):
    """Tests marked slow are skipped unless asked for. Under pytest-xdist (--dist loadgroup) tests
    that share a cluster or a session's fixtures stay on one worker: Slurm's mostly wait, so that
    the other worker has a core for itself."""
    for item in items:
        if item.get_closest_marker("slow") and not wants_slow(config):
            item.add_marker(pytest.mark.skip(reason="waits for minutes: --slow"))
        folder = item.path.relative_to(item.config.rootpath / "tests").parts[0]
        item.add_marker(pytest.mark.xdist_group("slurm" if folder == "slurm" else str(item.path)))
