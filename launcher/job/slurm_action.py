"""What Slurm did to a job. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.job.deadline import JobFacts
from launcher.job.outcome import OutcomeKind

PRINTED_TEXTS = (
    (OutcomeKind.PREEMPTED, "DUE TO PREEMPTION"),
    (OutcomeKind.NODE_FAILURE, "DUE TO NODE FAILURE"),
    (OutcomeKind.NODE_FAILURE, "srun: error: Node failure on "),
    (OutcomeKind.TIME_LIMIT, "DUE TO TIME LIMIT"),
)
"""slurmstepd and srun print these when Slurm ends a step."""
STATES = {
    "PREEMPTED": OutcomeKind.PREEMPTED,
    "NODE_FAIL": OutcomeKind.NODE_FAILURE,
    "BOOT_FAIL": OutcomeKind.NODE_FAILURE,
    "TIMEOUT": OutcomeKind.TIME_LIMIT,
    "OUT_OF_MEMORY": OutcomeKind.HOST_OOM,
    "CANCELLED": OutcomeKind.CANCELLED,
}
"""States of a job that Slurm has ended."""
REASONS = {
    "TimeLimit": OutcomeKind.TIME_LIMIT,
    "NodeDown": OutcomeKind.NODE_FAILURE,
    "NodeFail": OutcomeKind.NODE_FAILURE,
}
"""Slurm's reasons for the end of a job. A job has them already while it is COMPLETING."""


@dataclass(frozen=True)
class SlurmAction:
    """What Slurm did to a job."""

    kind: OutcomeKind
    requeued: bool = False
    """Slurm has put the job back into the queue itself."""


def derive_action(
    job: JobFacts | None, restarts: int, lines: Sequence[str] = (), terminated: bool = False
) -> SlurmAction | None:
    """What Slurm did to the job; None where nothing shows that Slurm did anything.

    ``job``: what Slurm says about the job now, None without a job or an answer; ``restarts``: the
    job's restarts when this attempt began; ``lines``: what srun and slurmstepd printed;
    ``terminated``: whether the supervisor got a TERM.
    """
    printed = next((kind for kind, text in PRINTED_TEXTS if any(text in line for line in lines)), None)
    if job is None:
        return SlurmAction(printed) if printed else None
    preempted = terminated or job.preempted
    # Slurm sends the supervisor a TERM before a preemption, and nothing when it loses a node
    if job.restarts > restarts:
        kind = printed or (OutcomeKind.PREEMPTED if preempted else OutcomeKind.NODE_FAILURE)
        return SlurmAction(kind, requeued=True)
    if printed:
        return SlurmAction(printed)
    # in the GraceTime of a QOS or partition the supervisor or its tasks get a TERM
    if job.state == "RUNNING":
        return SlurmAction(OutcomeKind.PREEMPTED) if preempted else None
    kind = STATES.get(job.state) or REASONS.get(job.reason)
    kind = kind or (OutcomeKind.PREEMPTED if job.preempted else None)
    kind = kind or (OutcomeKind.CANCELLED if terminated else None)
    return SlurmAction(kind) if kind else None


def restarted_after_loss(job: int | None, status: dict) -> bool:
    """Whether Slurm started the job again after the attempt of ``status`` lost its supervisor: a
    lost node, a kill at the time limit's end."""
    return job is not None and job == status.get("job")
