"""The job array of a sweep's stage: its runs by index, and the text of its batch script."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from launcher.config.sections import build_plain
from launcher.config.stages import Stage
from launcher.run.folder import Run
from launcher.slurm import commands, script


def is_element(run: Run) -> bool:
    """Whether the run is one of a sweep's."""
    return "sweep" in run.config["run"]


def index_of(run: Run) -> int:
    """A sweep's run is called by its index in the array."""
    return int(run.folder.name)


def array_script(folder: Path, identity: str, stage: Stage, runs: list[Run], values: list[dict]) -> str:
    """The batch script of a stage's array, which lists index -> run folder.

    ``folder``, ``identity``: the sweep's; ``values``: key -> value, of all runs of the sweep.
    """
    resources = getattr(build_plain("resources", runs[0].config["resources"]), stage.name)
    cases = [
        f"  {index}) run={shlex.quote(str(folder / str(index)))} ;;  # {format_values([values[index]])}"
        for index in map(index_of, runs)
    ]
    cases += ['  *) echo "element $SLURM_ARRAY_TASK_ID is none of this sweep" >&2; exit 64 ;;']
    request = script.JobRequest(
        name=f"{identity}.{stage.name}",
        comment=commands.comment(identity, stage.name),
        resources=resources,
        profile=runs[0].profile,
        output=f"{str(folder).replace('%', '%%')}/%a/{stage.name}/logs/slurm-%A_%a.out",
        setup=('case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"),
        command=f'{shlex.join(script.supervise_here())} "$run" {stage.name}',
    )
    return script.script(request)


def format_values(values: list[dict]) -> str:
    """The values of some runs on one line; JSON escapes the line breaks of texts."""
    return "; ".join(", ".join(f"{key}={json.dumps(value)}" for key, value in one.items()) for one in values)
