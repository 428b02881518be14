"""The output of a stage's supervisor: logs/slurm-JOB.out or logs/supervise.log."""

from __future__ import annotations

from pathlib import Path

from launcher.run.folder import Run
from training.files.safe_files import Unfit, read_tail

TAIL_BYTES = 1 << 16
"""So many bytes are read from the end of the output."""


def path_of(run: Run, stage: str, job: str) -> Path:
    """``job``: an id, an array's element ("20_7"), or "" for a supervisor without Slurm."""
    return run.stage(stage) / "logs" / (f"slurm-{job}.out" if job else "supervise.log")


def last_lines(run: Run, stage: str, job: str) -> list[str]:
    """The lines at the end of the output that are not empty; [] where there is no output."""
    try:
        lines = read_tail(path_of(run, stage, job), TAIL_BYTES)[0].decode(errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError, Unfit):
        return []
    return [line.rstrip() for line in lines if line.strip()]


def last_line_note(run: Run, stage: str, job: str) -> str:
    """The last line in brackets: of Slurm, or of a supervisor that could not write status.json."""
    lines = last_lines(run, stage, job)
    return f" ({path_of(run, stage, job)} ends: {lines[-1].strip()})" if lines else ""
