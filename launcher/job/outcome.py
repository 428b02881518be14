"""How an attempt ended, from what is known of it. Pure.

The order of belief: what Slurm did to the job, what the ranks were told to do, what the stage says
of itself (its last words, then its exit code), and only then the texts of torch, NCCL, srun and
Slurm.
"""

from __future__ import annotations

import re
import signal

from launcher.job.endings import CODES, REASONS, SAVED, Class, Ended, Facts, Verdict, shown

SIGNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        (
            Class.CUDA_OOM,
            r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|"
            r"Cuda failure .*out of memory",
        ),
        (
            Class.HOST_OOM,
            r"oom[-_ ]kill|Out Of Memory$|OOM Killed|^MemoryError|Cannot allocate memory|"
            r"can't allocate memory|killed by signal: Killed|insufficient shared memory",
        ),
        (Class.NAN, r"^FloatingPointError"),
        (Class.DISK_FULL, r"No space left on device|Disk quota exceeded|File too large|it needs [\d,.]+ GB of disk"),
        (
            Class.NODE_FAILURE,
            r"Node failure on|NODE FAILURE|uncorrectable ECC|fallen off the bus|\bXid\b|"
            r"CUDA driver initialization failed|no CUDA-capable device|No CUDA GPUs are available|"
            r"device\(s\) is/are busy or unavailable|Driver/library version mismatch|"
            r"Task launch for \S+ failed on node|Stale file handle|Transport endpoint is not "
            r"connected|Input/output error",
        ),
        (
            Class.COMMUNICATION,
            r"Watchdog caught collective operation timeout|Timed out waiting \d+ms|NCCL error|"
            r"ncclRemoteError|ncclSystemError|ncclInternalError|DistBackendError|"
            r"DistNetworkError|DistStoreError|Connection (closed|reset) by peer|Connection refused|Broken pipe|"
            r"[Ss]ocket [Tt]imeout|wait timeout after \d+ms|"
            r"[Tt]imed out after \d+ seconds waiting for clients|No route to host|"
            r"Temporary failure in name resolution|Name or service not known|Failed to check the \"should dump\" flag",
        ),
    )
)
"""What a rank's or srun's last lines show, most specific first. Texts of torch 2.x, NCCL, gloo,
glibc, Slurm 22-24."""
EXCEPTION = re.compile(r"^(\w[\w.]*(Error|Exception|Interrupt|Exit|Warning|Failed|Refused)\b.*|AssertionError.*)$")
TORCH = re.compile(r"RuntimeError|torch\.|Dist\w*Error")
"""Exceptions that may tell of a lost connection between ranks."""
TIMED_OUT = re.compile(r"[Tt]imed out|[Tt]imeout")


def classify(facts: Facts) -> Verdict:
    """The verdict on an attempt of which at least one rank did not exit 0."""
    first = first_failure(facts.ended)
    code = first.code if first.code > 0 else 128 - first.code
    saved = any(ended.code == SAVED for ended in facts.ended) and first.code == SAVED
    told = facts.fate or facts.asked

    def verdict(kind: Class, cause: str) -> Verdict:
        return Verdict(kind, cause, first.rank, first.lines, code)

    if saved:
        kind = told or Class.SAVED
        what = "what is done is kept" if facts.after is None else f"saved iteration {facts.after}"
        why = f" ({first.said.message})" if first.said else ""
        return verdict(kind, f"{REASONS[kind]}{why}; {what}")
    if facts.hung_minutes:
        cause = f"hung: no line, metric or checkpoint of any rank for {facts.hung_minutes} minutes, killed"
        return Verdict(Class.COMMUNICATION, cause, None, (), code)
    evidence = evident(first, facts.launcher)
    # also where it was told to save at that moment: a person must look
    if evidence is Class.UNHEALTHY:
        return verdict(Class.UNHEALTHY, first.words())
    if told in (Class.STOPPED, Class.CANCELLED):
        return verdict(told, f"{REASONS[told]}; last checkpoint: {shown(facts.after)}")
    if told and (evidence in (None, Class.COMMUNICATION, Class.NODE_FAILURE) or first.code < 0):
        last = f"last checkpoint: {shown(facts.after)}"
        return verdict(told, f"{REASONS[told]} and ended without saving ({first.words()}); {last}")
    kind = evidence or (Class.KILLED if first.code == -signal.SIGKILL else Class.BUG)
    if kind is Class.KILLED:
        return verdict(kind, f"{first.words()} (kill -9, or the machine ran out of memory)")
    return verdict(kind, first.words() if _shows(kind, first) else f"{first.words()}; {_sign(kind, facts.launcher)}")


def first_failure(ended: list[Ended]) -> Ended:
    """The rank whose failure the others follow from.

    The first to end is often a peer that noticed ("Connection closed by peer"): a rank with a cause
    of its own comes before it, in the order of their ends. Ranks that srun killed after it did not
    end by themselves; those of a collective that timed out because one hung look the same when it
    is that one that is killed.
    """
    late = ended and TIMED_OUT.search(ended[0].line)

    def follows(place: int, one: Ended) -> bool:
        kind = evident(one, ())
        killed = one.code in (-signal.SIGTERM, 143) or (late and place and one.code == -signal.SIGKILL)
        return kind is Class.COMMUNICATION or (bool(killed) and kind is None)

    return next((one for place, one in enumerate(ended) if not follows(place, one)), ended[0])


def evident(ended: Ended, launcher) -> Class | None:
    """What the rank says of itself. Of one that died without words: what its exit code says, then
    its last word, then its other last lines, then those of srun. None where nothing says
    anything."""
    if ended.said:
        return ended.said.kind or _sign_in((ended.said.message,), Class) or Class.BUG
    if ended.code in CODES:
        return CODES[ended.code]
    exception = EXCEPTION.match(ended.line)
    kinds = set(Class) - ({Class.COMMUNICATION} if exception and not TORCH.match(ended.line) else set())
    others = () if exception else ended.lines  # an exception speaks for itself
    return (
        _sign_in((ended.line,), kinds)
        or _sign_in(others, Class)
        or _sign_in(launcher, (Class.HOST_OOM, Class.NODE_FAILURE))
    )


def _sign_in(texts, kinds) -> Class | None:
    fitting = ((kind, pattern) for kind, pattern in SIGNS if kind in kinds)
    return next((kind for kind, pattern in fitting if any(pattern.search(text) for text in texts)), None)


def _shows(kind: Class, ended: Ended) -> bool:
    """Whether the rank's own words explain the class."""
    pattern = dict(SIGNS).get(kind)
    return pattern is None or ended.said is not None or bool(pattern.search(ended.line))


def _sign(kind: Class, launcher: list[str]) -> str:
    pattern = dict(SIGNS)[kind]
    return next((line for line in launcher if pattern.search(line)), kind.value)
