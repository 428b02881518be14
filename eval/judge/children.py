"""Processes that the evaluation starts: our modules from wherever we are, and no rank's
surroundings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = str(Path(__file__).absolute().parents[2])
START = (
    "import sys, runpy; root, module = sys.argv[1:3]; sys.path[:1] = [root]; sys.argv[:3] = [module]; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
OF_A_RANK = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_\w+|ROLE_\w+|MASTER_ADDR|MASTER_PORT|PYTHONSAFEPATH"
    r"|(TORCHELASTIC|OMPI_COMM_WORLD|PMI|PMIX)\w*|SLURM_(PROCID|LOCALID|NTASKS|NPROCS)"
)


def command(module: str, *arguments: str) -> list[str]:
    """``python -m MODULE``, but with our packages also where the current folder has an eval/ of its
    own."""
    return [sys.executable, "-c", START, ROOT, module, *arguments]


def environment() -> dict[str, str]:
    """Without what would make a child take itself for one of the stage's ranks, and wait for the
    others."""
    return {name: value for name, value in os.environ.items() if not OF_A_RANK.fullmatch(name)}
