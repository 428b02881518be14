"""What the Slurm here is and knows: version, cluster, accounting, and the jobs of this user in the queue."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED"}
TIMEOUT_S = 20
"""Seconds that a Slurm command may take; a controller that is down keeps them for about 10."""


class SlurmError(RuntimeError):
    """Slurm refused or did not answer; the message holds its own words."""


@dataclass(frozen=True)
class Site:
    version: str
    cluster: str
    accounting: bool


@dataclass(frozen=True)
class Job:
    id: int
    state: str
    reason: str

    @property
    def alive(self) -> bool:
        """Pending, running or ending; an ended job stays visible for MinJobAge."""
        return self.state not in ENDED


def call(*command: str) -> str:
    """Standard output of a Slurm command; SlurmError with its standard error where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise SlurmError(f"{command[0]} is not on PATH; is this a login node?") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer in {TIMEOUT_S} s: the controller is down or unreachable") from None
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def unusable() -> str:
    """Why there is no Slurm to use here; empty when there is one."""
    if shutil.which("sbatch") is None:
        return "no sbatch on PATH"
    try:
        call("sinfo", "-h", "-o", "%P")
    except SlurmError:
        return "sbatch is here, but sinfo reaches no cluster"
    return ""


def site() -> Site:
    """Version, cluster name and whether sacct works."""
    config = call("scontrol", "show", "config")
    values = dict(re.findall(r"^(\S+)\s*=\s(.*?)\s*$", config, re.MULTILINE))
    return Site(values["SLURM_VERSION"], values["ClusterName"], values["AccountingStorageType"] != "accounting_storage/none")


def comment(run_id: str, stage: str) -> str:
    """What marks a job as this stage of this run: ids are handed out again after a controller crash, this is not."""
    return f"convoy run={run_id} stage={stage}"


def jobs(run_id: str) -> dict[str, Job]:
    """Stage -> its job, alive or recently ended, matched by comment; of several the live one, else the newest."""
    found: dict[str, Job] = {}
    for line in call("squeue", "-h", "-t", "all", "-u", getpass.getuser(), "-o", "%A|%T|%r|%k").splitlines():
        number, state, reason, text = line.split("|", 3)
        match = re.fullmatch(rf"convoy run={re.escape(run_id)} stage=(\w+)", text.strip())
        if not match:
            continue
        job, stage = Job(int(number), state, reason), match[1]
        if stage not in found or (job.alive, job.id) > (found[stage].alive, found[stage].id):
            found[stage] = job
    return found
