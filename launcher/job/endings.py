"""The words for how an attempt ended: its class, what the ranks left, the verdict. Pure; see
launcher/job/outcome.py."""

from __future__ import annotations

import enum
import os
import signal
from dataclasses import dataclass, field

from launcher.job import advice


class Class(str, enum.Enum):
    """Kind of an ending; the value is what status.json and the ledger hold."""

    DONE = "done"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    SAVED = "saved"
    """Exit 75 that nobody here asked for."""
    NODE_FAILURE = "node failure"
    CUDA_OOM = "cuda oom"
    HOST_OOM = "host oom"
    NAN = "nan"
    COMMUNICATION = "communication timeout"
    DISK_FULL = "disk full"
    BAD_CONFIG = "bad config"
    BAD_DATA = "bad data"
    FILE_ERROR = "file error"
    """A file that can't be read or written, though the disk has room."""
    JUDGE = "judge"
    HARNESS = "harness"
    TOO_FEW_RATINGS = "too few ratings"
    KILLED = "killed"
    BUG = "bug"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    NO_PROGRESS = "no progress"
    PREFLIGHT = "preflight"
    CHECK = "check failed"
    """The nodes' check could not run, whichever node it was."""
    REFUSED = "refused"
    UNHEALTHY = "health gate"
    SLURM = "slurm"
    """Slurm did not answer, or refused."""


AGAIN = {Class.TIME_LIMIT, Class.PREEMPTED, Class.SAVED, Class.NODE_FAILURE, Class.COMMUNICATION, Class.PREFLIGHT}
"""Endings after which the stage queues itself again: another attempt may end otherwise."""
BLAMELESS = {Class.PREEMPTED, Class.NODE_FAILURE, Class.PREFLIGHT}
"""Endings that say nothing about the stage: they don't count as attempts without progress."""

SAID = {
    kind.value: kind
    for kind in (
        Class.CUDA_OOM,
        Class.HOST_OOM,
        Class.NAN,
        Class.NODE_FAILURE,
        Class.DISK_FULL,
        Class.FILE_ERROR,
        Class.BAD_CONFIG,
        Class.BAD_DATA,
        Class.REFUSED,
        Class.UNHEALTHY,
        Class.JUDGE,
        Class.HARNESS,
        Class.TOO_FEW_RATINGS,
        Class.BUG,
    )
}
"""Classes that a stage may call its own end (training/error_report.py, eval/error_report.py)."""
CODES = {
    os.EX_USAGE: Class.BAD_CONFIG,
    os.EX_DATAERR: Class.BAD_DATA,
    os.EX_CANTCREAT: Class.FILE_ERROR,
    os.EX_IOERR: Class.DISK_FULL,
    76: Class.UNHEALTHY,
    4: Class.TOO_FEW_RATINGS,
}
"""Exit codes of a stage by which it says itself what is wrong."""
SAVED = os.EX_TEMPFAIL
"""Exit code 75: the stage saved its state and wants to go on."""
LONGEST = 400
"""Characters of a rank's last words in a cause."""


@dataclass(frozen=True)
class Said:
    """What a rank left in its last words."""

    kind: Class | None
    """None: it does not know; only torch's text says what happened."""
    message: str


@dataclass(frozen=True)
class Ended:
    """How one rank, or srun itself (rank None), ended. ``code``: negative is a signal's number."""

    code: int
    rank: int | None = None
    line: str = ""
    """Its exception, or the last thing it printed."""
    lines: tuple[str, ...] = ()
    """Its last lines, oldest first."""
    said: Said | None = None

    def words(self) -> str:
        """Rank, how it ended and its last word."""
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        line = " ".join(self.said.message.split()) if self.said else self.line
        line = line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
        return f"{'a rank' if self.rank is None else f'rank {self.rank}'}: {how}{f': {line}' if line else ''}"


@dataclass(frozen=True)
class Facts:
    """What is known when the ranks of an attempt have ended."""

    stage: str
    ended: list[Ended]
    """Ranks that did not exit 0, in the order of their ends."""
    launcher: list[str] = field(default_factory=list)
    """Last lines of srun and slurmstepd."""
    asked: Class | None = None
    """Why the ranks were told to save and end, when they were."""
    fate: Class | None = None
    """What Slurm has done to the job, when it has (launcher/job/slurm_action.py)."""
    hung_minutes: int = 0
    """Above 0: the ranks were killed after so long without a sign of life."""
    before: int | None = None
    after: int | None = None
    """Iteration of the last checkpoint when the attempt began, and now."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt ended."""

    kind: Class
    cause: str
    rank: int | None = None
    lines: tuple[str, ...] = ()
    code: int = 1
    """Exit code of the stage, unless it queues itself again."""
    final: bool = False
    """A limit is reached."""
    relief: str = ""
    """What helps, where that was worked out for this stage."""

    @property
    def again(self) -> bool:
        return self.kind in AGAIN and not self.final

    def advice(self, stage: str) -> str:
        return self.relief or advice.of(self.kind.value, stage)


REASONS = {
    Class.TIME_LIMIT: "reached its time limit",
    Class.PREEMPTED: "preempted",
    Class.NODE_FAILURE: "a node failed",
    Class.CANCELLED: "told to stop (SIGTERM)",
    Class.STOPPED: "told to stop (file STOP)",
    Class.SAVED: "saved by itself",
}


def shown(number: int | None) -> str:
    return "none" if number is None else f"iteration {number}"
