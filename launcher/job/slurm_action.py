"""What Slurm did to a job: one place that works it out from all that shows it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.job.deadline import JobFacts
from launcher.job.endings import Class

TEXTS = (
    (Class.PREEMPTED, "DUE TO PREEMPTION"),
    (Class.NODE_FAILURE, "DUE TO NODE FAILURE"),
    (Class.NODE_FAILURE, "srun: error: Node failure on "),
    (Class.TIME_LIMIT, "DUE TO TIME LIMIT"),
)
"""What slurmstepd and srun print when Slurm ends a step."""
STATES = {
    "PREEMPTED": Class.PREEMPTED,
    "NODE_FAIL": Class.NODE_FAILURE,
    "BOOT_FAIL": Class.NODE_FAILURE,
    "TIMEOUT": Class.TIME_LIMIT,
    "OUT_OF_MEMORY": Class.HOST_OOM,
    "CANCELLED": Class.CANCELLED,
}
"""What Slurm calls a job that it has ended."""
REASONS = {"TimeLimit": Class.TIME_LIMIT, "NodeDown": Class.NODE_FAILURE, "NodeFail": Class.NODE_FAILURE}
"""Slurm's reason, which also stands there while an ended job is COMPLETING."""


@dataclass(frozen=True)
class Fate:
    """What Slurm did, and whether it has put the job back into the queue itself."""

    kind: Class
    requeued: bool = False


def fate_of(job: JobFacts | None, restarts: int, lines: Sequence[str] = (), terminated: bool = False) -> Fate | None:
    """None where nothing shows that Slurm did anything.

    ``job``: what Slurm says about it now, None where it does not answer or runs none; ``restarts``:
    of the job when this attempt began; ``lines``: what srun and slurmstepd printed; ``terminated``:
    whether the supervisor got a TERM.
    """
    text = next((kind for kind, words in TEXTS if any(words in line for line in lines)), None)
    if job is None:
        return Fate(text) if text else None
    # a preemption tells the supervisor by a TERM; of a lost node it hears nothing
    if job.restarts > restarts:
        return Fate(text or (Class.PREEMPTED if terminated or job.preempted else Class.NODE_FAILURE), requeued=True)
    if text:
        return Fate(text)
    # it gets a TERM, or its tasks do, and the GraceTime of its QOS or partition
    if job.state == "RUNNING":
        return Fate(Class.PREEMPTED) if terminated or job.preempted else None
    kind = STATES.get(job.state) or REASONS.get(job.reason) or (Class.PREEMPTED if job.preempted else None)
    return Fate(kind or Class.CANCELLED) if kind or terminated else None
