"""JobRequest -> script text (pure, through submitit) -> sbatch. The only file that touches
submitit."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from launcher import run_module
from launcher.config.sections import Profile, Resources
from launcher.config.stages import Stage
from launcher.run.folder import Run
from launcher.slurm import commands
from training.errors import ConfigError

SETUP = ("set -euo pipefail",)
EXPORT_CPUS = (
    'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # since 22.05 srun gives each task one core unless told'
)
SRUN_CPUS_SINCE, GPUS_PER_NODE_SINCE = (22, 5), (19, 5)
FIND_MODULE = (
    "command -v module >/dev/null || for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do "
    '[ -r "$file" ] && . "$file"; done'
    "  # a batch shell is no login shell"
)
NEEDS_RUN = (
    ': "${RUN:?which run? RUN=runs/<name> sbatch [--nodes=N ...] slurm/%s.sbatch, from the root of the project}"'
)


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
    """The job of one stage of one run; paths are as the run names them, so it is submitted from
    where the run was made."""
    folder = Path(run.config["run"]["folder"])
    return JobRequest(
        name=f"{run.id}.{stage.name}",
        comment=commands.comment(run.id, stage.name),
        resources=resources,
        profile=profile,
        output=f"{str(folder).replace('%', '%%')}/{stage.name}/logs/slurm-%j.out",
        command=shlex.join([*supervise_here(), str(folder), stage.name]),
    )


def committed_request(stage: Stage, resources: Resources) -> JobRequest:
    """The job of slurm/<stage>.sbatch: any run, named by RUN; partition, account and sizes come
    from sbatch's own options."""
    return JobRequest(
        name=f"convoy-{stage.name}",
        comment=f"convoy stage={stage.name}",
        resources=resources,
        profile=Profile(name="committed", scheduler="slurm", max_nodes=resources.nodes),
        output="slurm-%x-%j.out",
        command=f'"${{CONVOY_PYTHON:-python}}" -m launcher.job.supervise "$RUN" {stage.name}',
        setup=(NEEDS_RUN % stage.name,),
    )


def script(request: JobRequest) -> str:
    """The text of the batch script: parameters, set-up, and one ``exec`` as its last line, so that
    its exit code is the stage's own."""
    from submitit.slurm.slurm import _make_sbatch_string  # late: --help must not wait for it

    resources = request.resources
    profile = resources.at(request.profile)
    values = {
        **node_options(profile, resources.gpus_per_node),
        **profile.sbatch_options(),
        "comment": request.comment,
        "output": request.output,
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "signal": f"B:USR1@{min(profile.signal_lead_s, resources.minutes * 15)}",
    }
    for key, value in {**values, "job name": request.name}.items():
        # a line break would end the #SBATCH line and start one of its own
        if not str(value).isprintable():
            raise ConfigError(
                f"{key} = {value!r} has a line break or another character that can't be printed; remove it"
            )
    cpus = [] if (0, 0) < profile.version < SRUN_CPUS_SINCE else [EXPORT_CPUS]
    text = _make_sbatch_string(
        command=f"exec {request.command}",
        folder="unused",
        job_name=request.name,
        wckey=None,
        time=resources.minutes,
        nodes=resources.nodes + resources.spares,
        ntasks_per_node=resources.ranks_per_node,
        cpus_per_task=resources.cpus_per_gpu,
        stderr_to_stdout=True,
        use_srun=False,
        setup=[*SETUP, *request.setup, *site_setup(profile), *cpus],
        additional_parameters=values,
    )
    return _printable(text.rstrip("\n") + "\n")


def _printable(text: str) -> str:
    """The script; ConfigError for a character that would end a line, or hide one, where the shell
    or a reader sees it differently."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.replace("\t", " ").isprintable():
            raise ConfigError(
                f"line {number} of the batch script has a character that can't be printed: {line!r}; "
                "remove it from the profile's setup and modules, the paths, or what is swept"
            )
    return text


def node_options(profile: Profile, gpus: int) -> dict[str, str | int | bool]:
    """Options for the GPUs and the memory of each node, in the terms of this site and its version
    of Slurm."""
    values: dict[str, str | int | bool] = {}
    if gpus and profile.gpu_option != "none":
        gpus_option = f"{profile.gpu_type}:{gpus}" if profile.gpu_type else gpus
        old = profile.gpu_option == "gres" or (0, 0) < profile.version < GPUS_PER_NODE_SINCE
        values |= {"gres": f"gpu:{gpus_option}"} if old else {"gpus-per-node": gpus_option}
    if profile.whole_node(gpus):
        # --exclusive alone gives all cores, but only the default memory
        values |= {"exclusive": True, "mem": "0"}
    elif profile.mem_gb:
        values["mem"] = f"{profile.share_gib(gpus)}G"
    return values


def site_setup(profile: Profile) -> list[str]:
    """The profile's shell lines. ``set -u`` rests meanwhile: modules and activate scripts read
    variables that no one has set."""
    lines = [f"module load {shlex.join(profile.modules)}"] if profile.modules else []
    lines = [*([FIND_MODULE] if lines else []), *lines, *profile.setup]
    return ["set +u", *lines, "set -u"] if lines else []


def cancel(handles: list[str]) -> None:
    """scancel; handles come from the queue by name and comment, never from memory alone."""
    commands.call("scancel", *handles)


def release(handles: list[str]) -> None:
    """Let held jobs go."""
    commands.call("scontrol", "release", ",".join(handles))


def supervise_here() -> list[str]:
    """This interpreter and our supervisor: paths relative where they lie below the working
    directory, so that scripts survive a move of the project."""
    here = os.getcwd() + os.sep
    return [word.removeprefix(here) for word in run_module.command("launcher.job.supervise")]
