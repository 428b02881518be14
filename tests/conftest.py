"""Shared fixtures. One thread a rank: the machine may have two cores, and sums then have one
order."""

import functools
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


STARTERS = ("subprocess", "Popen", "ranks(", "stub_project", "support.distributed", "Project", "fork", "tests.fuzz")
"""Names in the text of test modules that start processes or torch.distributed."""
NEVER_QUICK = {"slurm", "gpu", "kernels", "fuzz", "benchmarks"}


@functools.cache
def is_quick(path: Path, folder: str) -> bool:
    """Whether a test module is of the fast tier (``make quick``): it starts no process, no Slurm
    and no torch.distributed, and is not marked long."""
    text = path.read_text(encoding="utf-8")
    return folder not in NEVER_QUICK and "pytest.mark.long" not in text and not any(name in text for name in STARTERS)


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
        if is_quick(item.path, folder):
            item.add_marker(pytest.mark.quick)
        item.add_marker(pytest.mark.xdist_group("slurm" if folder == "slurm" else str(item.path)))
