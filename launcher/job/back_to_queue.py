"""How a job goes back into Slurm's queue, without the nodes that failed it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from launcher.slurm import commands

RETRY_S = 300
"""Seconds for which the supervisor repeats a call that the controller does not answer."""
PAUSE_S = 3
"""Seconds between two calls."""
USABLE = re.compile(r"(idle|mix|alloc|comp|resv|reserved|planned)", re.IGNORECASE)
"""States of a node, as sinfo names them, in which it runs jobs, now or when it is free."""


def requeue(job: int, bad_nodes: list[str], needed: int, log_line: Callable[[str], None]) -> None:
    """Put this job, which needs ``needed`` nodes, back into the queue.

    Slurm ends the job and starts it again under the same id, without ``bad_nodes`` where the
    partition has enough others. Raises SlurmError where Slurm refuses, or does not answer for
    RETRY_S.
    """
    nodes = excluded_nodes(job, bad_nodes, needed, log_line) if bad_nodes else []
    _repeat_call(log_line, "scontrol", "requeue", commands.own_job(job))
    if nodes:  # Slurm refuses this while the job runs, and holds a requeued job back for some seconds
        _repeat_call(log_line, "scontrol", "update", f"jobid={commands.own_job(job)}", f"excnodelist={','.join(nodes)}")


def excluded_nodes(job: int, bad: list[str], needed: int, log_line: Callable[[str], None]) -> list[str]:
    """The job's new list of excluded nodes: those that it excludes already, and ``bad``.

    [], which changes nothing, where fewer than ``needed`` usable nodes would be left: the job would
    never start.
    """
    try:
        values = dict(re.findall(r"(\w+)=(\S*)", commands.call("scontrol", "show", "job", "-o", commands.own_job(job))))
        partition, before = values["Partition"], values.get("ExcNodeList", "(null)")
        nodes = set(bad) | (set() if before == "(null)" else set(_hostnames(before)))
        rows = commands.call("sinfo", "-h", "-N", f"--partition={partition}", "-o", "%N|%T").splitlines()
    except (commands.SlurmError, KeyError) as error:
        log_line(f"{', '.join(bad)} stay(s) among the job's nodes: Slurm does not say what others there are ({error})")
        return []
    usable = {name for name, state in (row.split("|") for row in rows if row.count("|") == 1) if USABLE.match(state)}
    if len(usable - nodes) < needed:
        log_line(
            f"{', '.join(bad)} stay(s) among the job's nodes: without, partition {partition} has {len(usable - nodes)} "
            f"usable node(s), and the job needs {needed}"
        )
        return []
    return sorted(nodes)


def _hostnames(text: str) -> list[str]:
    """["n1", "n2"] of Slurm's "n[1-2]"."""
    return commands.call("scontrol", "show", "hostnames", text).split()


def _repeat_call(log_line: Callable[[str], None], *command: str) -> None:
    deadline = time.monotonic() + RETRY_S
    while True:
        try:
            commands.call(*command)
            return
        except commands.SlurmError as error:
            if "disabled" in str(error):
                raise commands.SlurmError(f"{error}: the job was submitted with --no-requeue; resume goes on") from None
            if time.monotonic() > deadline:
                raise
            if "Job is no longer pending" not in str(error) and "Job/step already completing" not in str(error):
                log_line(f"{error}; asked again in {PAUSE_S} s")
        time.sleep(PAUSE_S if "update" not in command else 0.2)
