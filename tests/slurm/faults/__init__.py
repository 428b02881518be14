"""Every way a Slurm chain breaks, each injected into a real chain on a real Slurm: ``SCENARIOS`` by
name."""

from tests.slurm.faults import controller, files, jobs, late, ranks, shell, site  # noqa: F401 - they register
from tests.slurm.faults.case import SCENARIOS

__all__ = ["SCENARIOS"]
