"""How an attempt ended: the kinds of outcomes, and the functions that find the kind. Pure.

What Slurm did to the job counts first (launcher/job/slurm_action.py). Then comes the reason for
which the supervisor told the ranks to stop, then the ranks' own last words and exit codes, then the
texts of torch, NCCL, srun and Slurm.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import signal
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from launcher.job import advice
from launcher.run.manifest import DamagedOutput, Refused
from launcher.slurm.commands import SlurmError
from training.errors import ConfigError


class OutcomeKind(str, enum.Enum):
    """Kind of an outcome; status.json and the ledger hold the value as "class"."""

    DONE = "done"
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    SAVED = "saved"
    """The ranks saved and exited 75 though neither Slurm nor the supervisor told them to."""
    NODE_FAILURE = "node failure"
    CUDA_OOM = "cuda oom"
    HOST_OOM = "host oom"
    NAN = "nan"
    COMMUNICATION = "communication timeout"
    DISK_FULL = "disk full"
    BAD_CONFIG = "bad config"
    BAD_DATA = "bad data"
    FILE_ERROR = "file error"
    """A file can't be read or written, though the disk has room."""
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
    """The check of the nodes could not run; no node is at fault."""
    REFUSED = "refused"
    """Files of a parent, or of the stage itself, are not those of their manifest."""
    UNHEALTHY = "health gate"
    SLURM = "slurm"
    """Slurm did not answer, or refused."""


REQUEUED_KINDS = {
    OutcomeKind.TIME_LIMIT,
    OutcomeKind.PREEMPTED,
    OutcomeKind.SAVED,
    OutcomeKind.NODE_FAILURE,
    OutcomeKind.COMMUNICATION,
    OutcomeKind.PREFLIGHT,
}
"""The stage queues itself again after these: another attempt may succeed."""
FAULTLESS_KINDS = {OutcomeKind.PREEMPTED, OutcomeKind.NODE_FAILURE, OutcomeKind.PREFLIGHT}
"""The stage is not at fault: these do not count as attempts without progress."""
REPORTED_KINDS = {
    kind.value: kind
    for kind in (
        OutcomeKind.CUDA_OOM,
        OutcomeKind.HOST_OOM,
        OutcomeKind.NAN,
        OutcomeKind.NODE_FAILURE,
        OutcomeKind.DISK_FULL,
        OutcomeKind.FILE_ERROR,
        OutcomeKind.BAD_CONFIG,
        OutcomeKind.BAD_DATA,
        OutcomeKind.REFUSED,
        OutcomeKind.UNHEALTHY,
        OutcomeKind.JUDGE,
        OutcomeKind.HARNESS,
        OutcomeKind.TOO_FEW_RATINGS,
        OutcomeKind.BUG,
    )
}
"""Kinds that a stage may report of itself (training/error_report.py, eval/error_report.py)."""
KIND_OF_EXIT_CODE = {
    os.EX_USAGE: OutcomeKind.BAD_CONFIG,
    os.EX_DATAERR: OutcomeKind.BAD_DATA,
    os.EX_CANTCREAT: OutcomeKind.FILE_ERROR,
    os.EX_IOERR: OutcomeKind.DISK_FULL,
    76: OutcomeKind.UNHEALTHY,
    4: OutcomeKind.TOO_FEW_RATINGS,
}
"""A stage exits with one of these codes where it knows what is wrong."""
EXIT_SAVED = os.EX_TEMPFAIL
"""Exit code 75: the stage saved its state and wants to go on."""
EXIT_STOPPED = 143
"""Exit code after a TERM or STOP: 128 + SIGTERM."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CAUSE_CHARACTERS = 400
"""Most characters of a rank's last words in a cause."""
REASONS = {
    OutcomeKind.TIME_LIMIT: "reached its time limit",
    OutcomeKind.PREEMPTED: "preempted",
    OutcomeKind.NODE_FAILURE: "a node failed",
    OutcomeKind.CANCELLED: "told to stop (SIGTERM)",
    OutcomeKind.STOPPED: "told to stop (file STOP)",
    OutcomeKind.SAVED: "saved by itself",
}
"""How a cause names what Slurm did, or why the supervisor told the ranks to stop."""
TEXTS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            OutcomeKind.CUDA_OOM,
            r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
            r"Cuda failure .*out of memory",
        ),
        (
            OutcomeKind.HOST_OOM,
            r"oom[-_ ]kill|Out Of Memory$|OOM Killed|^MemoryError|Cannot allocate memory|"
            r"can't allocate memory|killed by signal: Killed|insufficient shared memory",
        ),
        (OutcomeKind.NAN, r"^FloatingPointError"),
        (
            OutcomeKind.DISK_FULL,
            r"No space left on device|Disk quota exceeded|File too large|it needs [\d,.]+ GB of disk",
        ),
        (
            OutcomeKind.NODE_FAILURE,
            r"Node failure on|NODE FAILURE|uncorrectable ECC|fallen off the bus|\bXid\b|"
            r"CUDA driver initialization failed|no CUDA-capable device|No CUDA GPUs are available|"
            r"device\(s\) is/are busy or unavailable|Driver/library version mismatch|"
            r"Task launch for \S+ failed on node|Stale file handle|Transport endpoint is not "
            r"connected|Input/output error",
        ),
        (
            OutcomeKind.COMMUNICATION,
            r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|NCCL error|"
            r"ncclRemoteError|ncclSystemError|ncclInternalError|DistBackendError|"
            r"DistNetworkError|DistStoreError|Connection (closed|reset) by peer|Connection refused|Broken pipe|"
            r"[Ss]ocket [Tt]imeout|wait timeout after \d+ms|"
            r"[Tt]imed out after \d+ seconds waiting for clients|No route to host|"
            r"Temporary failure in name resolution|Name or service not known|Failed to check the \"should dump\" flag",
        ),
    )
)
"""Texts of torch 2.x, NCCL, gloo, glibc and Slurm 22-24 in the last lines of a rank or of srun, the
most specific first."""
EXCEPTION = re.compile(r"^(\w[\w.]*(Error|Exception|Interrupt|Exit|Warning|Failed|Refused)\b.*|AssertionError.*)$")
TORCH = re.compile(r"RuntimeError|torch\.|Dist\w*Error")
"""Exceptions that may mean a lost connection between ranks."""
TIMED_OUT = re.compile(r"[Tt]imed out|[Tt]imeout")


@dataclass(frozen=True)
class LastWords:
    """What a rank wrote into its error report."""

    kind: OutcomeKind | None
    """None: the rank does not know it; only torch's text says what happened."""
    message: str


@dataclass(frozen=True)
class RankExit:
    """How one rank, or srun itself (rank None), ended. ``code``: negative is a signal's number."""

    code: int
    rank: int | None = None
    line: str = ""
    """Its exception, or the last line that it printed."""
    lines: tuple[str, ...] = ()
    """Its last lines, oldest first."""
    last_words: LastWords | None = None

    def describe(self) -> str:
        """Rank, exit code and last words."""
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        line = " ".join(self.last_words.message.split()) if self.last_words else self.line
        line = line if len(line) <= CAUSE_CHARACTERS else f"{line[:CAUSE_CHARACTERS]} ..."
        return f"{'a rank' if self.rank is None else f'rank {self.rank}'}: {how}{f': {line}' if line else ''}"


@dataclass(frozen=True)
class AttemptFacts:
    """What is known of an attempt that did not succeed."""

    stage: str
    exits: list[RankExit]
    """Ranks that did not exit 0, in the order of their ends; [] where no rank was started."""
    srun_lines: list[str] = field(default_factory=list)
    """Last lines of srun and slurmstepd."""
    stop_reason: OutcomeKind | None = None
    """Why the supervisor told the ranks to save and end; None where it did not."""
    slurm_action: OutcomeKind | None = None
    """What Slurm did to the job (launcher/job/slurm_action.py); None where it did nothing."""
    hung_minutes: int = 0
    """Above 0: the supervisor killed the ranks after so many minutes without a sign of life."""
    before: int | None = None
    """Iteration of the last checkpoint when the attempt began."""
    after: int | None = None
    """Iteration of the last checkpoint now."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    kind: OutcomeKind
    cause: str
    rank: int | None = None
    """The rank that failed first."""
    lines: tuple[str, ...] = ()
    """The last lines of that rank."""
    code: int = 1
    """Exit code of the stage, unless it queues itself again."""
    limit_reached: bool = False
    """A limit forbids another attempt (launcher/job/requeue.py)."""
    memory_advice: str = ""
    """Settings of this stage that would free GPU memory, after it ran out."""

    @property
    def may_requeue(self) -> bool:
        return self.kind in REQUEUED_KINDS and not self.limit_reached

    def advice(self, stage: str) -> str:
        return self.memory_advice or advice.of(self.kind.value, stage)


def classify(facts: AttemptFacts) -> Outcome:
    """The outcome of an attempt in which a rank did not exit 0, or which ended before its ranks
    started."""
    reason = facts.slurm_action or facts.stop_reason
    if not facts.exits:
        kind = reason or OutcomeKind.CANCELLED
        cause = f"{REASONS[kind]} before its ranks started; last checkpoint: {format_iteration(facts.before)}"
        return Outcome(kind, cause, code=EXIT_STOPPED)
    first = first_failure(facts.exits)
    code = first.code if first.code > 0 else 128 - first.code
    if facts.hung_minutes and first.code != EXIT_SAVED:
        cause = f"hung: no line, metric or checkpoint of any rank for {facts.hung_minutes} minutes, killed"
        return Outcome(OutcomeKind.COMMUNICATION, cause, code=code)
    kind, cause = _saved(first, reason, facts) if first.code == EXIT_SAVED else _failed(first, reason, facts)
    return Outcome(kind, cause, first.rank, first.lines, code)


def _saved(first: RankExit, reason: OutcomeKind | None, facts: AttemptFacts) -> tuple[OutcomeKind, str]:
    """(kind, cause) where the ranks saved before they ended."""
    kind = reason or OutcomeKind.SAVED
    message = f" ({first.last_words.message})" if first.last_words else ""
    progress = "what is done is kept" if facts.after is None else f"saved iteration {facts.after}"
    return kind, f"{REASONS[kind]}{message}; {progress}"


def _failed(first: RankExit, reason: OutcomeKind | None, facts: AttemptFacts) -> tuple[OutcomeKind, str]:
    """(kind, cause) where the rank ``first`` ended without saving."""
    reported = reported_kind(first, facts.srun_lines)
    # also where the ranks were told to save at that moment: a person must look
    if reported is OutcomeKind.UNHEALTHY:
        return reported, first.describe()
    last = f"last checkpoint: {format_iteration(facts.after)}"
    if reason in (OutcomeKind.STOPPED, OutcomeKind.CANCELLED):
        return reason, f"{REASONS[reason]}; {last}"
    follows = reported in (None, OutcomeKind.COMMUNICATION, OutcomeKind.NODE_FAILURE) or first.code < 0
    if reason and follows:
        return reason, f"{REASONS[reason]} and ended without saving ({first.describe()}); {last}"
    kind = reported or (OutcomeKind.KILLED if first.code == -signal.SIGKILL else OutcomeKind.BUG)
    if kind is OutcomeKind.KILLED:
        return kind, f"{first.describe()} (kill -9, or the machine ran out of memory)"
    explained = _explains(first, kind)
    return kind, first.describe() if explained else f"{first.describe()}; {_srun_text(kind, facts.srun_lines)}"


def first_failure(exits: list[RankExit]) -> RankExit:
    """The rank whose failure caused the others.

    The first to end is often a peer that noticed ("Connection closed by peer"). A rank with a cause
    of its own comes before it, in the order of their ends. Ranks that srun killed after the first
    failure have no cause of their own. Where a collective timed out because one rank hung, the
    killed rank is that one.
    """
    timed_out = exits and TIMED_OUT.search(exits[0].line)

    def follows(position: int, rank: RankExit) -> bool:
        kind = reported_kind(rank, ())
        killed = rank.code in (-signal.SIGTERM, EXIT_STOPPED)
        killed = killed or bool(timed_out and position and rank.code == -signal.SIGKILL)
        return kind is OutcomeKind.COMMUNICATION or (killed and kind is None)

    return next((rank for position, rank in enumerate(exits) if not follows(position, rank)), exits[0])


def reported_kind(rank: RankExit, srun_lines: Iterable[str]) -> OutcomeKind | None:
    """What the rank's last words say; without them its exit code, then its last line, then its
    other last lines, then those of srun. None where none of them names a kind."""
    if rank.last_words:
        return rank.last_words.kind or _kind_in((rank.last_words.message,), OutcomeKind) or OutcomeKind.BUG
    if rank.code in KIND_OF_EXIT_CODE:
        return KIND_OF_EXIT_CODE[rank.code]
    exception = EXCEPTION.match(rank.line)
    unrelated = {OutcomeKind.COMMUNICATION} if exception and not TORCH.match(rank.line) else set()
    others = () if exception else rank.lines  # an exception speaks for itself
    return (
        _kind_in((rank.line,), set(OutcomeKind) - unrelated)
        or _kind_in(others, OutcomeKind)
        or _kind_in(srun_lines, (OutcomeKind.HOST_OOM, OutcomeKind.NODE_FAILURE))
    )


def of_lost_attempt(status: dict, restarted: bool) -> Outcome:
    """The outcome of an attempt whose supervisor died before it wrote one.

    ``status``: status.json as that supervisor left it; ``restarted``: Slurm started the same job
    again.
    """
    lost = OutcomeKind.NODE_FAILURE if restarted else OutcomeKind.KILLED
    kind = OutcomeKind(status["class"]) if status.get("class") else lost
    before = f"{status['cause']}; " if status.get("cause") else ""
    after = f"; Slurm queued job {status['job']} again" if restarted else ""
    return Outcome(kind, f"{before}its supervisor was killed with it{after}")


def kind_of_error(error: Exception) -> OutcomeKind:
    """The kind of the outcome where the supervisor itself can't go on."""
    if isinstance(error, Refused):
        return OutcomeKind.REFUSED
    if isinstance(error, ConfigError):
        return OutcomeKind.BAD_CONFIG
    if isinstance(error, SlurmError):
        return OutcomeKind.SLURM
    if isinstance(error, OSError) and error.errno:
        return OutcomeKind.DISK_FULL if error.errno in DISK_FULL_ERRNOS else OutcomeKind.FILE_ERROR
    return OutcomeKind.BUG


def kind_of_manifest_error(error: Refused) -> OutcomeKind:
    """The kind where all ranks exited 0 and the stage's manifest can't be written."""
    return OutcomeKind.REFUSED if isinstance(error, DamagedOutput) else OutcomeKind.BUG


def format_iteration(number: int | None) -> str:
    return "none" if number is None else f"iteration {number}"


def _kind_in(lines: Iterable[str], kinds: Collection[OutcomeKind]) -> OutcomeKind | None:
    patterns = ((kind, pattern) for kind, pattern in TEXTS if kind in kinds)
    lines = tuple(lines)
    return next((kind for kind, pattern in patterns if any(pattern.search(line) for line in lines)), None)


def _explains(rank: RankExit, kind: OutcomeKind) -> bool:
    """Whether the rank's own words explain the kind."""
    pattern = dict(TEXTS).get(kind)
    return pattern is None or rank.last_words is not None or bool(pattern.search(rank.line))


def _srun_text(kind: OutcomeKind, srun_lines: list[str]) -> str:
    """The line of srun that names the kind."""
    pattern = dict(TEXTS)[kind]
    return next((line for line in srun_lines if pattern.search(line)), kind.value)
