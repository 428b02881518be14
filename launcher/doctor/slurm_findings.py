"""What doctor found about a site's Slurm, and what follows from each: text of Slurm's commands in,
findings out. Pure.

Sources: slurm.conf(5), sbatch(1), Slurm's release notes of 19.05 (--gpus-per-node), 21.08 and 22.05
(srun and --cpus-per-task); the endings of preempted and purged jobs were measured on 22.05.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TESTED = (22, 5)
NO_LIMIT_MINUTES = 7 * 24 * 60
"""What a profile says where the partition has no time limit."""


@dataclass(frozen=True)
class Finding:
    section: str
    name: str
    value: str
    follows: str
    """What it means for a run, in a sentence."""
    level: str = "ok"
    """"ok", "note" (know it), "bad" (a run will fail)."""
    settings: dict = field(default_factory=dict)
    """Keys of a profile that follow from it."""


@dataclass(frozen=True)
class Partition:
    """One partition with what its nodes have."""

    name: str
    default: bool
    up: bool
    minutes: int
    """Time limit; 0 = none."""
    nodes: int
    """Most nodes of a job: its limit, at most what it has."""
    gpu_type: str
    gpus: int
    """GPUs of each node: the number that most of its nodes have."""
    mem_gb: int
    """Least memory of a node, GiB."""
    exclusive: bool
    """A job always gets whole nodes."""
    preempt: str
    grace_s: int
    idle: int
    """Nodes that are idle now."""
    accounts: str


class Known(dict):
    """Keys and values as a Slurm prints them; what its version does not have is "unknown"."""

    def __missing__(self, key: str) -> str:
        return "unknown"

    def number(self, key: str, default: int) -> int:
        """The number that a value begins with, e.g. "30 sec"."""
        return leading(self[key], default)


def leading(text: str, default: int) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else default


def config_of(text: str) -> Known:
    """``scontrol show config`` -> key: value."""
    return Known(re.findall(r"^(\S+)\s*=\s(.*?)\s*$", text, re.MULTILINE))


def partitions_of(partitions: str, nodes: str) -> list[Partition]:
    """``scontrol show partition -o`` and ``sinfo -h -N -o '%N|%P|%G|%m|%c|%T|%f'`` -> partitions,
    in Slurm's order."""
    rows: dict[str, list[list[str]]] = {}
    for line in nodes.splitlines():
        name, partition, *rest = line.split("|")
        rows.setdefault(partition.rstrip("*"), []).append([name, *rest])
    result = []
    for line in partitions.splitlines():
        values = Known(part.split("=", 1) for part in line.split() if "=" in part)
        if "PartitionName" not in values:
            continue
        nodes_of_partition = rows.get(values["PartitionName"], [])
        kinds = [gpus_of(row[1]) for row in nodes_of_partition]
        kind = max(set(kinds), key=lambda one: (kinds.count(one), one)) if kinds else ("", 0)
        limit, have = values["MaxNodes"], len({row[0] for row in nodes_of_partition})
        result.append(
            Partition(
                values["PartitionName"],
                values["Default"] == "YES",
                values["State"] in ("UP", "unknown"),
                minutes_of(values["MaxTime"]),
                min(int(limit), have) if limit.isdigit() else have,
                *kind,
                min((leading(row[2], 0) for row in nodes_of_partition), default=0) // 1024,
                values["OverSubscribe"].startswith("EXCLUSIVE"),
                values["PreemptMode"],
                values.number("GraceTime", 0),
                sum(row[4].startswith("idle") for row in nodes_of_partition),
                values.get("AllowAccounts", "ALL"),
            )
        )
    return result


def gpus_of(gres: str) -> tuple[str, int]:
    """Type and number of "gpu:a100:8(S:0-1),nic:1"; ("", 0) without GPUs. The numbers of several
    types are not added: the larger wins."""
    kinds = [
        (kind or "", int(count)) for kind, count in re.findall(r"(?:^|,)gpu(?::([^:,(]+))??:(\d+)(?=[,(]|$)", gres)
    ]
    return max(kinds, key=lambda one: one[1], default=("", 0))


def minutes_of(text: str) -> int:
    """ "1-12:00:00" -> 2160; 0 for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return 0
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def choose_partition(partitions: list[Partition], name: str | None) -> Partition | None:
    """The named one; else of those that are open the one with most GPUs a node, the default before
    others; None where it isn't there."""
    if name:
        return next((one for one in partitions if one.name == name), None)
    return max(
        (one for one in partitions if one.up and one.nodes), key=lambda one: (one.gpus, one.default), default=None
    )


def slurm_findings(config: dict[str, str], accounts: list[str]) -> list[Finding]:
    """Version, accounting, limits and habits of the controller."""
    config = Known(config)
    version = config["SLURM_VERSION"]
    major, minor = (leading(part, 0) for part in (*version.split("."), "0")[:2]) if version[:1].isdigit() else TESTED
    if (major, minor) >= TESTED:
        note = "since 22.05 srun gives each task one core unless told: the scripts export SRUN_CPUS_PER_TASK"
    elif (major, minor) >= (19, 5):
        note = (
            "older than the tested 22.05: srun still inherits the cores of a task, and the scripts leave "
            "SRUN_CPUS_PER_TASK out"
        )
    else:
        note = "has no --gpus-per-node: the scripts ask by --gres=gpu:N"
    level = "ok" if (major, minor) >= TESTED else "note"
    return [
        Finding("Slurm", "version", version, note, level),
        Finding("Slurm", "cluster", config["ClusterName"], "answers"),
        *_accounting(config, accounts),
        *_gpu_option(config),
        *_requeue(config),
        *_limits(config),
    ]


def _accounting(config: Known, accounts: list[str]) -> list[Finding]:
    if config["AccountingStorageType"].endswith("/none"):
        memory_of_jobs = f"{config.number('MinJobAge', 300)} s (MinJobAge)"
        return [
            Finding(
                "Slurm",
                "accounting",
                "off",
                "sacct knows nothing; status asks the run's own files first, then squeue, which "
                f"forgets a job {memory_of_jobs} after its end",
                "note",
            )
        ]
    findings = [
        Finding(
            "Slurm",
            "accounting",
            config["AccountingStorageType"].rpartition("/")[2],
            "sacct tells how a job ended that squeue has forgotten",
        )
    ]
    enforced = config["AccountingStorageEnforce"]
    needed = "associations" in enforced or "limits" in enforced or "safe" in enforced
    if len(accounts) == 1:
        findings.append(
            Finding(
                "Slurm",
                "account",
                accounts[0],
                "your only one: written into the profile",
                "ok",
                {"account": accounts[0]},
            )
        )
    elif accounts:
        findings.append(
            Finding("Slurm", "accounts", ", ".join(accounts), 'choose one: account = "..." in the profile', "note")
        )
    elif needed:
        findings.append(
            Finding(
                "Slurm",
                "account",
                "none",
                f"you have no association and the site enforces them ({enforced}): every job is "
                "refused; ask the site for an account",
                "bad",
            )
        )
    return findings


def _gpu_option(config: Known) -> list[Finding]:
    select, detail = config["SelectType"].rpartition("/")[2], config["SelectTypeParameters"]
    tres = select in ("cons_tres", "linear") and "gpu" in config["GresTypes"]
    if "gpu" not in config["GresTypes"]:
        note, option = "GPUs are no GRES here: no one counts them, so stages with GPUs ask for whole nodes", "none"
    elif select == "cons_tres":
        note, option = "GPUs are asked for by --gpus-per-node", "gpus-per-node"
    else:
        note, option = "knows no --gpus-per-node: GPUs are asked for by --gres=gpu:N", "gres"
    findings = [
        Finding("GPUs", "GresTypes", config["GresTypes"], note, "ok" if tres else "note", {"gpu_option": option}),
        Finding(
            "GPUs",
            "SelectType",
            f"{select}, {detail}",
            "memory is handed out, too: a part of a node asks for its share (mem_gb)"
            if "MEMORY" in detail.upper()
            else "memory is not handed out: jobs on one node share it",
        ),
    ]
    if select == "linear":
        findings.append(
            Finding(
                "GPUs", "whole nodes", "always", "a job gets whole nodes: one GPU costs as much as all of them", "note"
            )
        )
    return findings


def _requeue(config: Known) -> list[Finding]:
    kind, mode = config["PreemptType"].rpartition("/")[2], config["PreemptMode"]
    if kind == "none":
        note, level = "no job is taken from its nodes for another", "ok"
    elif "REQUEUE" in mode:
        note, level = "a preempted job is put back into the queue by Slurm and goes on from its last checkpoint", "ok"
    elif "SUSPEND" in mode:
        note, level = (
            "a preempted job is suspended on its GPUs; NCCL then times out and the stage fails: keep to a "
            "partition that nothing preempts",
            "bad",
        )
    else:
        note, level = (
            "a preempted job is cancelled, and the rest of its chain with it: python -m launcher resume RUN goes on; "
            "better a partition that nothing preempts",
            "note",
        )
    again = config["JobRequeue"] == "1"
    wait = int(match[1]) if (match := re.search(r"cred_expire=(\d+)", config["AuthInfo"])) else 120
    return [
        Finding("Slurm", "preemption", f"{kind}, {mode}", note, level),
        Finding(
            "Slurm",
            "JobRequeue",
            config["JobRequeue"],
            "jobs may be requeued"
            if again
            else "jobs are not requeued unless they ask: the scripts ask (--requeue); should the site forbid it, "
            "a stage ends at its time limit and resume goes on",
            "ok" if again else "note",
        ),
        Finding(
            "Slurm",
            "requeue delay",
            f"{wait + 1} s",
            "a stage that saved and requeued itself waits so long before it runs again",
        ),
    ]


def _limits(config: Known) -> list[Finding]:
    size, kill = config.number("MaxArraySize", 1001), config.number("KillWait", 30)
    refuses = config["EnforcePartLimits"] in ("ALL", "ANY", "YES")
    return [
        Finding(
            "Slurm",
            "MaxArraySize",
            str(size),
            f"a sweep has at most {max(0, size - 1)} elements"
            if size > 1
            else "job arrays are switched off: no sweeps",
            "ok" if size > 1 else "note",
        ),
        Finding(
            "Slurm",
            "KillWait",
            f"{kill} s",
            "between TERM and KILL: a checkpoint that takes longer is not finished then; the lead of "
            "the time limit's signal (signal_lead_s) is what counts",
        ),
        Finding(
            "Slurm",
            "EnforcePartLimits",
            config["EnforcePartLimits"],
            "a job over its partition's limits is refused at once"
            if refuses
            else "a job over its partition's limits is accepted and waits without end: status says so "
            "(PartitionTimeLimit)",
            "ok" if refuses else "note",
        ),
    ]


def partition_findings(partitions: list[Partition], chosen: Partition | None, memory: bool) -> list[Finding]:
    """One a partition; ``chosen`` is the one that a profile would use, with the settings that
    follow. ``memory``: Slurm hands it out."""
    findings = []
    for one in partitions:
        gpus = (
            f"{one.gpus} {one.gpu_type or 'GPU'}{'s' if one.gpus > 1 and not one.gpu_type else ''} a node"
            if one.gpus
            else "no GPUs"
        )
        limit = f"{one.minutes} min" if one.minutes else "no time limit"
        value = f"{'' if one.up else 'CLOSED, '}{one.nodes} nodes, {gpus}, {one.mem_gb} GiB, {limit}, {one.idle} idle"
        note = _preempted(one) if one.up else "takes no jobs"
        if one.accounts != "ALL":
            note += f"; only for accounts {one.accounts}"
        findings.append(
            Finding(
                "Partitions",
                one.name,
                value,
                note + ("; the profile uses it" if one == chosen else ""),
                "ok" if one.up else "note",
                settings_of(one, memory) if one == chosen else {},
            )
        )
    if chosen is None:
        findings.append(
            Finding(
                "Partitions", "usable", "none", "no partition is open and has nodes: nothing can run here now", "bad"
            )
        )
    return findings


def settings_of(one: Partition, memory: bool) -> dict:
    """Keys of the profile for jobs in this partition."""
    return {
        "partition": one.name,
        "gpu_type": one.gpu_type,
        "gpus_per_node": one.gpus,
        "mem_gb": one.mem_gb if memory else 0,
        "max_nodes": one.nodes,
        "max_minutes": one.minutes or NO_LIMIT_MINUTES,
        "exclusive": bool(one.gpus),
        "device": "cuda" if one.gpus else "cpu",
    }


def _preempted(one: Partition) -> str:
    if one.preempt == "OFF":
        return "its jobs are not preempted"
    if one.grace_s:
        term = f"Slurm sends TERM {one.grace_s} s before the end, in which a stage saves and requeues itself"
        return f"preemptible ({one.preempt}): {term}"
    advice = "a stage goes on from its last checkpoint, so save often (save_every)"
    return f"preemptible ({one.preempt}) without GraceTime: {advice}"
