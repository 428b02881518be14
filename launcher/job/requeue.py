"""What follows an attempt: done, requeued or failed. Pure, with the limits of requeueing.

launcher/job/back_to_queue.py acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from launcher.config.stages import Stage
from launcher.job.outcome import EXIT_SAVED, EXIT_STOPPED, FAULTLESS_KINDS, Outcome, OutcomeKind
from launcher.job.slurm_action import SlurmAction

BAD_PREFLIGHTS = 3
"""Preflights in a row that found a bad node; after so many, no single node is at fault."""
REQUEUED, VANISHED = "requeued", "vanished"
"""Events of the ledger. REQUEUED: an attempt ended and the stage was queued again. VANISHED: an
attempt's supervisor died with it."""


@dataclass(frozen=True)
class History:
    """Attempts of a stage since it was last submitted or resumed."""

    attempts: int = 0
    """Started, the present one included."""
    ends: tuple[dict, ...] = ()
    """The ledger's rows of how those before it ended, where another followed."""


@dataclass(frozen=True)
class AttemptProgress:
    """What one attempt got done."""

    moved: bool
    """Whether it got anything done."""
    before: int | None = None
    """The checkpoint that it began from."""


def decide(
    outcome: Outcome,
    history: History,
    stage: Stage,
    max_attempts: int,
    progress: AttemptProgress,
    action: SlurmAction | None = None,
    cancelled: bool = False,
) -> tuple[str, Outcome]:
    """What follows an attempt: (the stage's state, the outcome with the reason that forbids another
    attempt).

    ``action``: what Slurm did; ``cancelled``: a person has cancelled the run meanwhile.
    """
    if outcome.kind is OutcomeKind.DONE:
        return "done", outcome
    if action and action.requeued:
        return "requeued", replace(outcome, code=EXIT_SAVED)
    if outcome.kind in (OutcomeKind.CANCELLED, OutcomeKind.STOPPED):
        return outcome.kind.value, replace(outcome, code=EXIT_STOPPED)
    if outcome.may_requeue:
        outcome = _limited(outcome, history, stage, max_attempts, progress)
    if not outcome.may_requeue:
        return "failed", outcome
    if cancelled:
        return "cancelled", replace(outcome, kind=OutcomeKind.CANCELLED, code=EXIT_STOPPED)
    return "requeued", replace(outcome, code=EXIT_SAVED)


def expected_state(action: SlurmAction) -> str:
    """The state that follows from Slurm's action alone, while the ranks still save: Slurm may kill
    the supervisor before ``decide`` can be asked."""
    if action.kind is OutcomeKind.CANCELLED:
        return "cancelled"
    return "requeued" if action.requeued else "running"


def _limited(outcome: Outcome, history: History, stage: Stage, max_attempts: int, progress: AttemptProgress) -> Outcome:
    """The outcome itself where another attempt may follow; else one with the limit that forbids
    it."""
    if history.attempts >= max_attempts:
        limit = f"that was attempt {history.attempts} of at most {max_attempts} (profile: max_attempts)"
        return replace(outcome, limit_reached=True, cause=f"{outcome.cause}; {limit}")
    if outcome.kind is OutcomeKind.PREFLIGHT:
        kinds = [end["class"] for end in history.ends[1 - BAD_PREFLIGHTS :]]
        return replace(outcome, limit_reached=kinds == [OutcomeKind.PREFLIGHT.value] * (BAD_PREFLIGHTS - 1))
    if outcome.kind is OutcomeKind.TIME_LIMIT and not stage.resumable:
        return replace(outcome, limit_reached=True, cause=f"{outcome.cause}; this stage saves nothing on its way")
    counted = [end for end in history.ends if OutcomeKind(end["class"]) not in FAULTLESS_KINDS]
    if progress.moved or outcome.kind in FAULTLESS_KINDS or not counted or has_moved(counted[-1]):
        return outcome
    before = progress.before
    trained = "ended before a first checkpoint" if before is None else f"began and ended at iteration {before}"
    attempts = f"two attempts {trained if stage.trainer else 'got nothing done'}"
    cause = f"no progress: {attempts}; the last one: {outcome.cause}"
    return replace(outcome, kind=OutcomeKind.NO_PROGRESS, cause=cause)


def has_moved(end: dict) -> bool:
    """Whether the attempt of this row of the ledger got anything done."""
    return end.get("moved", (end.get("iteration") or 0) > (end.get("began") or 0))


def history_of(ledger: list[dict], stage: str) -> History:
    attempts, ends = 0, []
    for event in ledger:
        if event["event"] == "runner" or (event["event"] in ("submitted", "rewound") and event.get("stage") == stage):
            attempts, ends = 0, []
        elif event.get("stage") == stage and event["event"] == "started":
            attempts += 1
        elif event.get("stage") == stage and event["event"] in (REQUEUED, VANISHED) and "class" in event:
            ends.append(event)
    return History(attempts, tuple(ends))
