"""JobRequest -> script text (pure, through submitit) -> sbatch. The only file that touches submitit."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import probe
from launcher.config import Profile, Resources
from launcher.pipeline import Stage
from launcher.run import Run, write_text
from training.config import ConfigError

SETUP = ("set -euo pipefail",)
EXPORT_CPUS = 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # since 22.05 srun gives each task one core unless told'
NEEDS_RUN = ': "${RUN:?which run? RUN=runs/<name> sbatch [--nodes=N ...] slurm/%s.sbatch, from the root of the project}"'


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    name: str
    comment: str
    command: str
    """Shell text after ``exec``; its parts are already quoted."""
    output: str
    """Where the batch script's own lines go; %j and %x are Slurm's."""
    resources: Resources
    profile: Profile
    setup: tuple[str, ...] = ()
    """Shell lines before the profile's own."""


def stage_request(run: Run, stage: Stage, resources: Resources, profile: Profile) -> JobRequest:
    """The job of one stage of one run; paths are as the run names them, so it is submitted from where the run was made."""
    folder = Path(run.config["run"]["folder"])
    return JobRequest(
        name=f"{run.id}.{stage.name}", comment=probe.comment(run.id, stage.name), resources=resources, profile=profile,
        output=f"{str(folder).replace('%', '%%')}/{stage.name}/logs/slurm-%j.out",
        command=shlex.join([python_here(), "-m", "launcher.supervise", str(folder), stage.name]))


def committed_request(stage: Stage, resources: Resources) -> JobRequest:
    """The job of slurm/<stage>.sbatch: any run, named by RUN; partition, account and sizes come from sbatch's own options."""
    return JobRequest(
        name=f"convoy-{stage.name}", comment=f"convoy stage={stage.name}", resources=resources,
        profile=Profile(name="committed", scheduler="slurm", max_nodes=resources.nodes), output="slurm-%x-%j.out",
        command=f'"${{CONVOY_PYTHON:-python}}" -m launcher.supervise "$RUN" {stage.name}', setup=(NEEDS_RUN % stage.name,))


def script(request: JobRequest) -> str:
    """The text of the batch script: parameters, set-up, and one ``exec`` as its last line, so that its exit code is the stage's own."""
    from submitit.slurm.slurm import _make_sbatch_string  # late: --help must not wait for it

    resources, profile = request.resources, request.profile
    values = {key: value for key in ("partition", "account", "qos", "constraint") if (value := getattr(profile, key))}
    for key, value in {"job name": request.name, "comment": request.comment, "output": request.output, **values}.items():
        if not value.isprintable():  # a line break would end the #SBATCH line and start one of its own
            raise ConfigError(f"{key} = {value!r} has a line break or another character that can't be printed; remove it")
    if resources.gpus_per_node:
        values["gpus_per_node"] = resources.gpus_per_node
    if profile.exclusive and resources.gpus_per_node == profile.gpus_per_node:
        values["exclusive"] = True
    text = _make_sbatch_string(
        command=f"exec {request.command}", folder="unused", job_name=request.name, comment=request.comment, wckey=None,
        time=resources.minutes, nodes=resources.nodes, ntasks_per_node=resources.ranks_per_node, cpus_per_task=resources.cpus_per_gpu,
        stderr_to_stdout=True, use_srun=False, setup=[*SETUP, *request.setup, *profile.setup, EXPORT_CPUS],
        additional_parameters={"output": request.output, "requeue": True, "kill-on-invalid-dep": "yes",
                               "signal": f"B:USR1@{min(profile.signal_lead_s, resources.minutes * 15)}"},
        **values)
    return text.rstrip("\n") + "\n"


def submit_chain(run: Run, requests: dict[Stage, JobRequest], alive: dict[str, int]) -> dict[str, int]:
    """Queue the stages so that either all are queued or none.

    ``alive``: stage -> job that the queue shows under this run's comment; only these and the jobs made here become dependencies: to Slurm
    an id that it no longer knows is a satisfied one. Jobs that wait for no other of this chain are held until the last is in.
    Returns stage -> job id; raises SlurmError after cancelling what was queued.
    """
    made: dict[str, int] = {}
    held: list[int] = []
    try:
        for stage, request in requests.items():
            path = run.stage(stage.name) / f"{stage.name}.sbatch"
            write_text(path, script(request))
            (run.stage(stage.name) / "logs").mkdir(exist_ok=True)  # Slurm ends a job without a word when it can't open its output
            waits = [made[parent] if parent in made else alive[parent] for parent in stage.parents if parent in made or parent in alive]
            options = [f"--dependency=afterok:{':'.join(map(str, waits))}"] if waits else []
            hold = not any(parent in made for parent in stage.parents)
            printed = probe.call("sbatch", "--parsable", *options, *(["--hold"] if hold else []), str(path))
            made[stage.name] = int(printed.strip().split(";")[0])
            held += [made[stage.name]] if hold else []
            run.record("submitted", stage=stage.name, job=made[stage.name], after=waits)
        probe.call("scontrol", "release", ",".join(map(str, held)))
    except (probe.SlurmError, OSError) as error:
        if made:
            cancel(list(made.values()))
            run.record("withdrawn", jobs=made, cause=str(error))
        raise
    return made


def cancel(ids: list[int]) -> None:
    """scancel; ids come from the queue by comment, never from memory alone."""
    probe.call("scancel", *map(str, ids))


def python_here() -> str:
    """This interpreter, relative where it lies below the working directory, so that scripts survive a move of the project."""
    here = os.getcwd() + os.sep
    return sys.executable[len(here):] if sys.executable.startswith(here) else sys.executable
