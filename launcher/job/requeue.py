"""Whether a stage may queue itself again, and how: limits, damaged checkpoints, the call to
Slurm."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from launcher.config.stages import Stage
from launcher.job.endings import BLAMELESS, SAVED, Class, Verdict
from launcher.run.folder import Run, iteration_folder, write_text
from launcher.slurm import commands

RETRY_S = 300
"""Seconds for which a controller that does not answer is asked again."""
PAUSE_S = 3
USABLE = re.compile(r"(idle|mix|alloc|comp|resv|reserved|planned)", re.IGNORECASE)
"""States of a node, as sinfo names them, in which it runs jobs, now or when it is free."""
ENDED = 143
"""Exit code after a TERM or STOP: 128 + SIGTERM."""
NO_WORK = (
    "config.json",
    "status.json",
    "metrics.jsonl",
    "verified.json",
    "latest",
    "SHA256",
    ".attempt",
    ".reserve",
    ".lock",
)
"""Files of a stage that say nothing about how far it is."""
BAD_STARTS = 3
"""Preflights in a row that found a bad node: then the fault is no single node's."""


@dataclass(frozen=True)
class History:
    """Attempts of a stage since it was last submitted or resumed."""

    attempts: int = 0
    """Started, the present one included."""
    ends: tuple[dict, ...] = ()
    """The ledger's rows of how those before it ended, where another followed."""


def decide(
    verdict: Verdict,
    history: History,
    stage: Stage,
    max_attempts: int,
    *,
    moved: bool,
    before: int | None = None,
    requeued: bool = False,
    cancelled: bool = False,
) -> tuple[str, Verdict]:
    """What follows an attempt: (the stage's state, the verdict with what speaks against another
    attempt). Pure.

    ``moved``: whether this attempt got anything done; ``before``: the checkpoint that it began
    from; ``requeued``: Slurm has put the job back into the queue itself; ``cancelled``: a person
    has cancelled the run meanwhile.
    """
    if verdict.kind is Class.DONE:
        return "done", verdict
    if requeued:
        return "requeued", replace(verdict, code=SAVED)
    if verdict.kind in (Class.CANCELLED, Class.STOPPED):
        return verdict.kind.value, replace(verdict, code=ENDED)
    if verdict.again:
        verdict = _limited(verdict, history, stage, max_attempts, moved, before)
    if not verdict.again:
        return "failed", verdict
    if cancelled:
        return "cancelled", replace(verdict, kind=Class.CANCELLED, code=ENDED)
    return "requeued", replace(verdict, code=SAVED)


def _limited(
    verdict: Verdict, history: History, stage: Stage, max_attempts: int, moved: bool, before: int | None
) -> Verdict:
    """The verdict itself where another attempt may follow; else one that says why none does."""
    if history.attempts >= max_attempts:
        limit = f"that was attempt {history.attempts} of at most {max_attempts} (profile: max_attempts)"
        return replace(verdict, final=True, cause=f"{verdict.cause}; {limit}")
    if verdict.kind is Class.PREFLIGHT:
        row = [end["class"] for end in history.ends[1 - BAD_STARTS :]]
        return replace(verdict, final=row == [Class.PREFLIGHT.value] * (BAD_STARTS - 1))
    if verdict.kind is Class.TIME_LIMIT and not stage.resumable:
        return replace(verdict, final=True, cause=f"{verdict.cause}; this stage saves nothing on its way")
    counted = [end for end in history.ends if end["class"] not in BLAMELESS_VALUES]
    if moved or verdict.kind in BLAMELESS or not counted or has_moved(counted[-1]):
        return verdict
    trained = "ended before a first checkpoint" if before is None else f"began and ended at iteration {before}"
    where = trained if stage.trainer else "got nothing done"
    return replace(
        verdict, kind=Class.NO_PROGRESS, cause=f"no progress: two attempts {where}; the last one: {verdict.cause}"
    )


def has_moved(end: dict) -> bool:
    """Whether an attempt that ended so had got anything done."""
    return end.get("moved", (end.get("iteration") or 0) > (end.get("began") or 0))


BLAMELESS_VALUES = {kind.value for kind in BLAMELESS}
REQUEUED, VANISHED = "requeued", "vanished"
"""Events of the ledger: an attempt ended and the stage was queued again; its supervisor died with
it."""


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


def work_done(run: Run, stage: Stage) -> int:
    """How far a stage is: a trainer's last checkpoint; of others the bytes that they have
    finished."""
    if stage.trainer:
        return run.iteration(stage.name) or 0
    total = 0
    for folder, folders, names in os.walk(run.stage(stage.name)):
        folders[:] = [name for name in folders if name not in ("logs", "preflight")]
        for name in names:
            if name in NO_WORK or name.endswith((".part", ".tmp", ".new", ".lock")):
                continue
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def set_aside(run: Run, stage: Stage, good: int | None, bad: dict[int, str]) -> None:
    """Move damaged checkpoints to checkpoints.aside and make the newest whole one ``latest``;
    nothing is deleted."""
    folder = run.stage(stage.name)
    aside = folder / "checkpoints.aside"
    aside.mkdir(exist_ok=True)
    if good is None:
        (folder / "latest").unlink()
    else:
        write_text(folder / "latest", f"{good}\n")
    for iteration, reason in bad.items():
        source, number = folder / "checkpoints" / iteration_folder(iteration), 0
        while (target := aside / f"{source.name}{f'.{number}' if number else ''}").exists():
            number += 1
        if source.exists():
            os.replace(source, target)
        run.record("bad checkpoint", stage=stage.name, iteration=iteration, reason=reason)


def back_to_queue(job: int, exclude: list[str], needed: int, say: Callable[[str], None]) -> None:
    """Put this job, of ``needed`` nodes, back into the queue; Slurm ends it and starts it again
    under the same id, without the nodes ``exclude`` where the partition has enough others.

    Raises SlurmError where Slurm refuses, or does not answer for RETRY_S.
    """
    nodes = exclusion(job, exclude, needed, say) if exclude else []
    _insist(say, "scontrol", "requeue", commands.own_job(job))
    if nodes:  # refused while the job runs; Slurm holds a requeued one back for some seconds
        _insist(say, "scontrol", "update", f"jobid={commands.own_job(job)}", f"excnodelist={','.join(nodes)}")


def exclusion(job: int, bad: list[str], needed: int, say: Callable[[str], None]) -> list[str]:
    """The job's new list of excluded nodes: those that it has excluded so far, and ``bad``.

    Empty, which changes nothing, where fewer than ``needed`` usable nodes would be left: the job
    would wait for ever.
    """
    try:
        values = dict(re.findall(r"(\w+)=(\S*)", commands.call("scontrol", "show", "job", "-o", commands.own_job(job))))
        partition, before = values["Partition"], values.get("ExcNodeList", "(null)")
        nodes = set(bad) | (set() if before == "(null)" else set(_hostnames(before)))
        rows = commands.call("sinfo", "-h", "-N", f"--partition={partition}", "-o", "%N|%T").splitlines()
    except (commands.SlurmError, KeyError) as error:
        say(f"{', '.join(bad)} stay(s) among the job's nodes: Slurm does not say what others there are ({error})")
        return []
    usable = {name for name, state in (row.split("|") for row in rows if row.count("|") == 1) if USABLE.match(state)}
    if len(usable - nodes) < needed:
        say(
            f"{', '.join(bad)} stay(s) among the job's nodes: without, partition {partition} has {len(usable - nodes)} "
            f"usable node(s), and the job needs {needed}"
        )
        return []
    return sorted(nodes)


def _hostnames(text: str) -> list[str]:
    """["n1", "n2"] of Slurm's "n[1-2]"."""
    return commands.call("scontrol", "show", "hostnames", text).split()


def _insist(say: Callable[[str], None], *command: str) -> None:
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
                say(f"{error}; asked again in {PAUSE_S} s")
        time.sleep(PAUSE_S if "update" not in command else 0.2)
