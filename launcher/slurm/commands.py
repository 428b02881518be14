"""What the Slurm here is: version, cluster, accounting; and how its commands are called."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launcher.config import environment

TIMEOUT_S = 20
"""Seconds that a Slurm command may take; a controller that is down keeps them for about 10."""
READABLE = {"SLURM_TIME_FORMAT": "standard", "SLURM_BITSTR_LEN": "0"}
"""Dates as ISO 8601, the indices of an array in full."""


class SlurmError(RuntimeError):
    """Slurm refused or did not answer; the message holds its own words."""


@dataclass(frozen=True)
class Site:
    version: str
    cluster: str
    accounting: bool


def call(
    *command: str, timeout_s: float = TIMEOUT_S, environ: dict[str, str] | None = None, with_errors: bool = False
) -> str:
    """Standard output of a Slurm command (and its standard error, ``with_errors``); SlurmError with
    its standard error where it fails.

    ``environ``: what sbatch hands on to a job (environment.for_sbatch); other commands get what
    they need to reach the controller.
    """
    own = environment.outside() if environ is None else environ
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**own, **READABLE},
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH; is this a login node?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer in {timeout_s:g} s: the controller is down or unreachable"
        ) from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout + done.stderr if with_errors else done.stdout


def ping(timeout_s: float = TIMEOUT_S) -> None:
    """Raise SlurmError at once where no controller answers: scontrol tells it in milliseconds, its
    other commands take 9 s."""
    try:
        call("scontrol", "ping", timeout_s=timeout_s)
    except SlurmError as error:
        lines = str(error).removeprefix("scontrol: ").splitlines()
        if not any(" is UP" in line for line in lines):  # of several controllers one may be down
            raise SlurmError(next((line for line in lines if " is DOWN" in line), lines[-1])) from None


def unusable() -> str:
    """Why there is no Slurm to use here; empty when there is one."""
    if shutil.which("sbatch") is None:
        return "no sbatch on PATH"
    named = os.environ.get("SLURM_CONF")
    if named and not Path(named).is_file():  # else Slurm's commands look for it for a minute
        return f"SLURM_CONF = {named} does not exist"
    try:
        ping()
    except SlurmError as error:
        return f"sbatch is here, but no cluster answers ({error})"
    return ""


def login_node(reason: str) -> bool:
    """Whether this is a machine of a cluster, whose controller may be down; ``reason``: what
    ``unusable`` said.

    Slurm's programs may be installed where no cluster is: they then have no configuration.
    """
    return not reason or not any(text in reason for text in ("no sbatch", "does not exist", "configuration source"))


def site() -> Site:
    """Version, cluster name and whether sacct works."""
    config = call("scontrol", "show", "config")
    values = dict(re.findall(r"^(\S+)\s*=\s(.*?)\s*$", config, re.MULTILINE))
    return Site(
        values.get("SLURM_VERSION", ""),
        values.get("ClusterName", ""),
        values.get("AccountingStorageType", "") != "accounting_storage/none",
    )


def user() -> str:
    """Who asks, by name, or by number where the name is not known here: the queue is never asked
    for everybody's jobs."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def own_job(job: int) -> str:
    """What scontrol and scancel call the job that this process runs in: to them the id of a job
    array's last element is the whole array."""
    element = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{element}" if element else str(job)


def comment(run_id: str, stage: str) -> str:
    """What marks a job as this stage of this run: ids are handed out again after a controller
    crash, this is not."""
    return f"convoy run={run_id} stage={stage}"
