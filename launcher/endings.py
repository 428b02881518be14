"""How an attempt ended: its class, the cause in one sentence, the rank that failed first, and what to do. Pure.

The order of belief: what Slurm says it did to the job, what the ranks were told to do, the exit code, what the ranks wrote.
"""

from __future__ import annotations

import enum
import os
import re
import signal
from dataclasses import dataclass, field


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


AGAIN = {Class.TIME_LIMIT, Class.PREEMPTED, Class.SAVED, Class.NODE_FAILURE, Class.COMMUNICATION, Class.PREFLIGHT}
"""Endings after which the stage queues itself again: another attempt may end otherwise."""
BLAMELESS = {Class.PREEMPTED, Class.NODE_FAILURE, Class.PREFLIGHT}
"""Endings that say nothing about the stage: they don't count as attempts without progress."""

ADVICE = {
    Class.CUDA_OOM: "lower {stage}.micro_batch_size (micro_batch_tokens where it is set), or share the model out further: "
                    "{stage}.tensor_parallel, {stage}.pipeline_parallel (new run: --name); resume alone would end the same way",
    Class.HOST_OOM: "give each rank more of the node's memory: more resources.{stage}.cpus_per_gpu or whole nodes (profile: exclusive = "
                    "true), or fewer ranks a node; then resume",
    Class.NAN: "look at metrics.jsonl before it; go on from an earlier checkpoint with --load-iteration, with a lower {stage}.lr or "
               "{stage}.clip_grad",
    Class.COMMUNICATION: "see which rank is missing in the log; if it is always the same node, exclude it; else the site's network "
                         "settings (profile: network)",
    Class.DISK_FULL: "free space or quota where the run folder is, or lower {stage}.keep_checkpoints; then resume",
    Class.NODE_FAILURE: "tell the site about the node; resume goes on elsewhere",
    Class.BAD_CONFIG: "correct the value that is named and submit again",
    Class.BAD_DATA: "correct the row that is named, or set data.skip_bad_rows = true, and submit again",
    Class.KILLED: "find out who killed it (dmesg of the node: out of memory?); then resume",
    Class.BUG: "read the traceback in the log; after the fix, resume goes on from the last checkpoint",
    Class.CANCELLED: "resume goes on from the last checkpoint",
    Class.STOPPED: "resume removes the file STOP and goes on from the last checkpoint",
    Class.NO_PROGRESS: "raise resources.{stage}.minutes or lower {stage}.save_every, so that one attempt reaches a checkpoint; then resume",
    Class.TIME_LIMIT: "raise resources.{stage}.minutes, or lower {stage}.save_every; then resume",
    Class.PREEMPTED: "resume, or ask for a partition or QOS that is not preempted",
    Class.SAVED: "resume goes on from the last checkpoint",
    Class.PREFLIGHT: "tell the site about the node; resume goes on elsewhere",
    Class.CHECK: "read the lines [preflight] of the log: Slurm or the profile's setup keeps the check from running, no "
                 "node is at fault; preflight = false in the profile goes without it; then resume",
    Class.UNHEALTHY: "look at metrics.jsonl and the log's warnings; resume goes on from the last checkpoint, resume --from {stage} "
                     "--load-iteration N from an earlier one, with another {stage}.lr or {stage}.kl_coef, or the limit moved",
    Class.REFUSED: "make the stage that is named run again: python -m launcher resume RUN --from STAGE",
}

SIGNS = tuple((kind, re.compile(pattern)) for kind, pattern in (
    (Class.CUDA_OOM, r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
                     r"Cuda failure .*out of memory"),
    (Class.HOST_OOM, r"oom[-_ ]kill|Out Of Memory$|OOM Killed|^MemoryError|Cannot allocate memory|can't allocate memory|"
                     r"killed by signal: Killed|insufficient shared memory"),
    (Class.NAN, r"^FloatingPointError"),
    (Class.DISK_FULL, r"No space left on device|Disk quota exceeded|File too large|it needs [\d,.]+ GB of disk"),
    (Class.NODE_FAILURE, r"Node failure on|NODE FAILURE|uncorrectable ECC|fallen off the bus|\bXid\b|CUDA driver initialization failed|"
                         r"no CUDA-capable device|No CUDA GPUs are available|device\(s\) is/are busy or unavailable|"
                         r"Driver/library version mismatch|Task launch for \S+ failed on node|Stale file handle|"
                         r"Transport endpoint is not connected|Input/output error"),
    (Class.COMMUNICATION, r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|NCCL error|ncclRemoteError|"
                          r"ncclSystemError|ncclInternalError|DistBackendError|DistNetworkError|DistStoreError|"
                          r"Connection (closed|reset) by peer|"
                          r"Connection refused|Broken pipe|[Ss]ocket [Tt]imeout|wait timeout after \d+ms|"
                          r"[Tt]imed out after \d+ seconds waiting for clients|No route to host|Temporary failure in name resolution|"
                          r"Name or service not known|Failed to check the \"should dump\" flag"),
))
"""What a rank's or srun's last lines show, most specific first. Texts of torch 2.x, NCCL, gloo, glibc, Slurm 22-24."""

FATES = ((Class.PREEMPTED, "DUE TO PREEMPTION"), (Class.NODE_FAILURE, "DUE TO NODE FAILURE"), (Class.TIME_LIMIT, "DUE TO TIME LIMIT"))
CODES = {os.EX_USAGE: Class.BAD_CONFIG, os.EX_DATAERR: Class.BAD_DATA, os.EX_IOERR: Class.DISK_FULL, 76: Class.UNHEALTHY}
"""Exit codes of a stage by which it says itself what is wrong."""
SAVED = os.EX_TEMPFAIL
"""Exit code 75: the stage saved its state and wants to go on."""
EXCEPTION = re.compile(r"^(\w[\w.]*(Error|Exception|Interrupt|Exit|Warning|Failed|Refused)\b.*|AssertionError.*)$")
TIMED_OUT = re.compile(r"[Tt]imed out|[Tt]imeout")
LONGEST = 400
"""Characters of a rank's last words in a cause."""


@dataclass(frozen=True)
class Ended:
    """How one rank, or srun itself (rank None), ended. ``code``: negative is a signal's number."""

    code: int
    rank: int | None = None
    line: str = ""
    """Its exception, or the last thing it printed."""
    lines: tuple[str, ...] = ()
    """Its last lines, oldest first."""

    def words(self) -> str:
        """Rank, how it ended and its last word."""
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        line = self.line if len(self.line) <= LONGEST else f"{self.line[:LONGEST]} ..."
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
    """What Slurm has done to the job, when it has."""
    hung_minutes: int = 0
    """Above 0: the ranks were killed after so long without a sign of life."""
    before: int | None = None
    after: int | None = None
    """Iteration of the last checkpoint when the attempt began, and now."""


@dataclass(frozen=True)
class Verdict:
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
        return self.relief or (ADVICE[self.kind].format(stage=stage) if self.kind in ADVICE else "")


def classify(facts: Facts) -> Verdict:
    """The verdict on an attempt of which at least one rank did not exit 0."""
    first = first_failure(facts.ended)
    code = first.code if first.code > 0 else 128 - first.code
    saved = any(ended.code == SAVED for ended in facts.ended) and first.code == SAVED
    fate = facts.fate or next((kind for kind, words in FATES if any(words in line for line in facts.launcher)), None)
    told = fate or facts.asked

    def verdict(kind: Class, cause: str) -> Verdict:
        return Verdict(kind, cause, first.rank, first.lines, code)

    if saved:
        kind = told or Class.SAVED
        return verdict(kind, f"{REASONS[kind]}: saved iteration {facts.after}{' and goes on' if kind in AGAIN else ''}")
    if facts.hung_minutes:
        return Verdict(Class.COMMUNICATION, f"hung: no line, metric or checkpoint of any rank for {facts.hung_minutes} minutes, killed",
                       None, (), code)
    if CODES.get(first.code) is Class.UNHEALTHY:  # also where it was told to save at that moment: a person must look
        return verdict(Class.UNHEALTHY, first.words())
    evidence = _kind(first, facts.launcher)
    if told in (Class.STOPPED, Class.CANCELLED):
        return verdict(told, f"{REASONS[told]}; last checkpoint: {shown(facts.after)}")
    if told and (evidence in (None, Class.COMMUNICATION, Class.NODE_FAILURE) or first.code < 0):
        return verdict(told, f"{REASONS[told]} and ended without saving ({first.words()}); last checkpoint: {shown(facts.after)}")
    kind = CODES.get(first.code) or evidence
    if kind is Class.BAD_DATA and "SHA256" in first.line:  # a checkpoint, not a row
        kind = Class.REFUSED
    if kind is None:
        kind = Class.KILLED if first.code == -signal.SIGKILL else Class.BUG
    if kind is Class.KILLED:
        return verdict(kind, f"{first.words()} (kill -9, or the machine ran out of memory)")
    return verdict(kind, first.words() if _shows(kind, first) else f"{first.words()}; {_sign(kind, facts.launcher)}")


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


def first_failure(ended: list[Ended]) -> Ended:
    """The rank whose failure the others follow from.

    The first to end is often a peer that noticed ("Connection closed by peer"): a rank with a cause of its own comes before it, in the
    order of their ends. Ranks that srun killed after it did not end by themselves; those of a collective that timed out because one
    hung look the same when it is that one that is killed.
    """
    late = ended and TIMED_OUT.search(ended[0].line)

    def follows(place: int, one: Ended) -> bool:
        kind = _kind(one, ())
        killed = one.code in (-signal.SIGTERM, 143) or (late and place and one.code == -signal.SIGKILL)
        return kind is Class.COMMUNICATION or (bool(killed) and kind is None)

    return next((one for place, one in enumerate(ended) if not follows(place, one)), ended[0])


def _kind(ended: Ended, launcher) -> Class | None:
    """What the last word, then the other last lines of the rank, then those of srun show."""
    others = () if EXCEPTION.match(ended.line) else ended.lines  # an exception speaks for itself
    for texts, kinds in (((ended.line,), Class), (others, Class), (launcher, (Class.HOST_OOM, Class.NODE_FAILURE))):
        for kind, pattern in SIGNS:
            if kind in kinds and any(pattern.search(text) for text in texts):
                return kind
    return None


def _shows(kind: Class, ended: Ended) -> bool:
    """Whether the rank's own last word explains the class."""
    pattern = dict(SIGNS).get(kind)
    return pattern is None or bool(pattern.search(ended.line))


def _sign(kind: Class, launcher: list[str]) -> str:
    pattern = dict(SIGNS)[kind]
    return next((line for line in launcher if pattern.search(line)), kind.value)
