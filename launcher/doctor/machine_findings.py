"""What doctor finds on this machine and in this shell, and what follows. Text in, findings out, but
for ``here``."""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from pathlib import Path

from launcher.config import environment
from launcher.config.environment import KEYS
from launcher.doctor.slurm_findings import Finding
from launcher.run.folder import lock
from training.errors import ConfigError

PORTS = (20000, 31999)
"""MASTER_PORT is 20000 + job id % 12000."""
SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.ceph",
    "wekafs",
    "panfs",
    "glusterfs",
    "fuse.glusterfs",
    "pvfs2",
    "orangefs",
    "afs",
    "cifs",
    "smb3",
    "9p",
    "virtiofs",
    "fuse.juicefs",
    "fuse.JuiceFS",
}
LOCAL = {"tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "f2fs"}
say = functools.partial(Finding, "This machine")


def here(folder: Path, srun_help: str) -> list[Finding]:
    """Port range, the file system of ``folder``, container runtimes, the interpreter, and what the
    shell would add to a job."""
    low, high = (int(number) for number in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    programs = {name: path for name in ("enroot", "apptainer", "singularity") if (path := shutil.which(name))}
    kind, free_gb = (
        file_system(folder, Path("/proc/self/mountinfo").read_text()),
        shutil.disk_usage(folder).free // 10**9,
    )
    python = say(
        "python",
        f"{sys.executable} ({sys.version.split()[0]})",
        "jobs start it by this path: it has to lie in a folder that the compute nodes see",
    )
    return [
        ports("This machine", low, high),
        shared_folder(folder, kind, free_gb),
        locks(folder),
        containers(programs, "--container-image" in srun_help),
        python,
        *shell(dict(os.environ)),
    ]


def file_system(folder: Path, mountinfo: str) -> str:
    """Type of the file system of ``folder``, from the text of /proc/self/mountinfo: the mount with
    the longest matching path."""
    best, kind = "", "unknown"
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def shared_folder(folder: Path, kind: str, free_gb: int) -> Finding:
    value = f"{folder}: {kind}, {free_gb} GB free"
    if kind in SHARED:
        return say("runs folder", value, "a network file system: all nodes should see it (doctor --node proves it)")
    if kind in LOCAL:
        return say(
            "runs folder",
            value,
            "a file system of this machine alone: other nodes will not see a run that is made here; "
            "work in a shared folder (doctor --node proves it)",
            "note",
        )
    return say("runs folder", value, "not known to be shared; doctor --node proves it", "note")


def locks(folder: Path) -> Finding:
    """Takes a lock in the folder of the runs, as every command on a run does."""
    place = folder / "runs" if (folder / "runs").is_dir() else folder
    path = place / f".convoy-lock-{os.getpid()}"
    try:
        with lock(path):
            return say("locks", "work", f"{place} has locks; doctor --node tells whether the nodes see them")
    except (ConfigError, OSError) as error:
        return say("locks", "none", str(error), "bad")
    finally:
        path.unlink(missing_ok=True)


def ports(section: str, low: int, high: int) -> Finding:
    """Whether MASTER_PORT lies in the range from which the kernel hands ports to other programs."""
    value, own = f"{low}-{high}", f"{PORTS[0]}-{PORTS[1]}"
    if high < PORTS[0] or low > PORTS[1]:
        return Finding(
            section,
            "ephemeral ports",
            value,
            f"MASTER_PORT ({own}) lies outside: no other program is given it by chance",
        )
    return Finding(
        section,
        "ephemeral ports",
        value,
        f"overlaps MASTER_PORT ({own}): another program may hold the port when a stage "
        "starts; better the site reserves ours (net.ipv4.ip_local_reserved_ports)",
        "note",
    )


def containers(programs: dict[str, str], pyxis: bool) -> Finding:
    if pyxis:
        return say(
            "containers",
            "pyxis (srun --container-image)",
            'ranks can run in an image: [container] runtime = "pyxis"; slurm/container makes one',
        )
    if "apptainer" in programs:
        return say(
            "containers",
            programs["apptainer"],
            'ranks can run in an image: [container] runtime = "apptainer"; slurm/container makes one',
        )
    if "singularity" in programs:
        return say(
            "containers",
            programs["singularity"],
            "Singularity, Apptainer's older name: put a link called apptainer to it on "
            'PATH, then [container] runtime = "apptainer"',
            "note",
        )
    return say(
        "containers", "none found", "stages run with the interpreter that submitted them, and the site's modules"
    )


def shell(variables: dict[str, str]) -> list[Finding]:
    """Variables of the shell that jobs don't get, or that are stored with them; no key's value."""
    names, line = environment.dropped(environ=variables), environment.note(environ=variables)
    note = line.partition(" in this shell: ")[2]
    findings = [say("the shell's variables", ", ".join(names), note, "note")] if names else []
    keys = sorted(
        name for name, value in variables.items() if KEYS.search(name) and value and not name.startswith("SLURM")
    )
    if keys:
        findings.append(
            say(
                "keys in the shell",
                ", ".join(keys),
                "sbatch stores the shell's environment with each job; put them into a file "
                'that only you can read and name it in the profile: secrets = "~/.config/convoy.env"',
                "note",
            )
        )
    if "SLURM_JOB_ID" in variables:
        findings.append(
            say(
                "inside a job",
                variables["SLURM_JOB_ID"],
                "a chain that is submitted here gets none of this "
                "job's SLURM_* variables; its jobs are jobs of their own",
            )
        )
    return findings
