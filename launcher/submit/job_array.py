"""The job array of a sweep's stage: its runs by index, and the text of its batch script."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from launcher.config.sections import build_plain
from launcher.config.stages import Stage
from launcher.run.folder import Run, elements, sweep_of
from launcher.slurm import commands
from launcher.slurm import script as sbatch


@dataclass(frozen=True)
class SweepRun:
    """One element of a sweep."""

    index: int
    run: Run
    values: dict
    """Key, e.g. "sft.lr", -> value."""


def members(folder: Path) -> list[SweepRun]:
    """The runs of a sweep, by index."""
    values = sweep_of(folder)["values"]
    return [SweepRun(int(run.folder.name), run, values[int(run.folder.name)]) for run in elements(folder)]


def array_script(folder: Path, identity: str, stage: Stage, runs: list[SweepRun]) -> str:
    """The batch script of a stage's array: index -> run folder in plain sight."""
    config = runs[0].run.config
    resources = getattr(build_plain("resources", config["resources"]), stage.name)
    cases = [
        f"  {member.index}) run={shlex.quote(str(folder / str(member.index)))} ;;  # {values_text([member.values])}"
        for member in runs
    ]
    cases += ['  *) echo "element $SLURM_ARRAY_TASK_ID is none of this sweep" >&2; exit 64 ;;']
    site, supervise = runs[0].run.profile, sbatch.supervise_here()
    return sbatch.script(
        sbatch.JobRequest(
            name=f"{identity}.{stage.name}",
            comment=commands.comment(identity, stage.name),
            resources=resources,
            profile=site,
            output=f"{str(folder).replace('%', '%%')}/%a/{stage.name}/logs/slurm-%A_%a.out",
            setup=('case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"),
            command=f'{shlex.join(supervise)} "$run" {stage.name}',
        )
    )


def values_text(values: list[dict]) -> str:
    """The values of some runs on one line; JSON escapes the line breaks of texts."""
    return "; ".join(", ".join(f"{key}={json.dumps(value)}" for key, value in one.items()) for one in values)
