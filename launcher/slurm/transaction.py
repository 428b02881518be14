"""Queue a chain so that all of it is queued or nothing is, whoever dies half-way.

Every job carries the submission's token in its comment, and those that wait for no other of the
chain are held. The ledger says "submitting" before the first sbatch and "committed" when all are
in; only then are they released, and it says "queued". A guard, a process of its own, settles what a
killed submitter or a silent controller leaves: committed -> released, else cancelled. Should the
guard die too, the next command on the run does it (``settle``). A release whose answer is lost may
have happened: once a job of a committed chain may run, none is cancelled.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launcher import run_module
from launcher.config import environment
from launcher.run.folder import SWEEP, Busy, Run, elements
from launcher.slurm import commands
from launcher.slurm.polling import pauses
from launcher.slurm.queue import ENDED
from training.config.schema import usage

LOCK_S = 60
"""Seconds that a command waits for another one on the same run to finish its submission."""
GUARD_S = 3600
"""Seconds for which the guard asks a controller that does not answer; then the jobs stay held until
the next command."""
ASK_EVERY_S = 1.0
DONE = b"done"


@dataclass(frozen=True)
class Step:
    """One job, or job array, of a chain."""

    stage: str
    identity: str
    """The run's id, or the sweep's: what the job's name and comment say."""
    script: Path
    parents: tuple[str, ...] = ()
    """Stages whose outputs this one reads; those of this submission, and those in ``waits``, become
    its dependency."""
    waits: tuple[tuple[str, int], ...] = ()
    """(stage, job) of parents that the queue shows under this run's comment. Only these, never an
    old id: to Slurm an id that it no longer knows is a satisfied dependency."""
    dependency: str = "afterok"
    """"afterok", or for arrays "aftercorr": each element waits for its own."""
    array: str = ""
    """Elements of a job array, e.g. "0-3"."""
    without: tuple[str, ...] = ()
    """Variables that sbatch must not see: it would store the keys of a secrets file in the
    controller's state."""
    passed: tuple[str, ...] = ()
    """The profile's ``pass_environment``."""


def submit(book: Run, steps: list[Step]) -> dict[str, int]:
    """Queue the steps, in order, all or none; stage -> job id. ``book`` keeps the ledger; its lock
    is held by the caller.

    Raises SlurmError or OSError after withdrawing what was queued; where Slurm does not let it, the
    guard goes on trying.
    """
    settle(book)
    token, submitted, held_jobs = secrets.token_hex(4), {}, []
    book.record("submitting", token=token, stages=[step.stage for step in steps])
    with _guarded(book) as guard:
        try:
            for step in steps:
                submitted[step.stage], hold = _sbatch(step, token, submitted)
                held_jobs += [str(submitted[step.stage])] if hold else []
            for step in steps:
                waits = [submitted[parent] for parent in step.parents if parent in submitted] + [
                    job for _, job in step.waits
                ]
                book.record("submitted", stage=step.stage, job=submitted[step.stage], after=waits)
            book.record("committed", token=token, held=held_jobs)
            _finish(book, token, held_jobs)
        except (commands.SlurmError, OSError, KeyboardInterrupt) as error:
            try:
                settle(book, str(error) or "interrupted")
            except (commands.SlurmError, OSError):
                committed = _open(book, "committed", token)
                what = (
                    "all of it is queued and goes on, and process {} releases what is still held"
                    if committed
                    else "what was queued is held, and process {} withdraws it"
                ).format(guard.pid)
                raise commands.SlurmError(
                    f"{error}; {what} as soon as Slurm answers (so does the next command on {book.folder})"
                ) from None
            if _open(book, "queued", token):
                return submitted  # the release was refused first and accepted then
            raise
        finally:
            if _last(book)["event"] in ("queued", "withdrawn"):
                with contextlib.suppress(OSError):
                    guard.stdin.write(DONE)
    return submitted


def settle(book: Run, cause: str = "the command that submitted it was stopped half-way") -> None:
    """Bring the last submission of ``book`` to an end if it has none: release it when all of it is
    in, else cancel its jobs.

    Repeating it changes nothing. Raises SlurmError while Slurm does not answer.
    """
    last = _last(book)
    if last["event"] == "committed":
        _go_forward(book, last)
    elif last["event"] == "submitting":
        _withdraw(book, last["token"], cause)


class Queued(NamedTuple):
    """A job of a submission as the queue shows it; an array is one job."""

    stage: str
    job: str
    state: str
    reason: str


def tokened(token: str) -> list[Queued]:
    """Every job of this user that was submitted with ``token``, ended or not."""
    jobs_found = []
    for line in commands.call("squeue", "-h", "-t", "all", "-u", commands.user(), "-o", "%F|%T|%r|%k").splitlines():
        if f" submission={token} " in line:
            job, state, reason, comment = line.split("|", 3)
            jobs_found.append(Queued(comment.rpartition("stage=")[2].strip(), job, state, reason))
    return jobs_found


def _go_forward(book: Run, committed: dict) -> None:
    """Release what is still held of a committed submission, unless the controller has lost a part
    of it.

    It saves its state up to 5 s late, and an id that it forgot is a satisfied dependency to it. A
    stage that the queue does not show any more may also have ended; then the chain has begun.
    """
    token = committed["token"]
    jobs_found = tokened(token)
    lost = set(_stages(book, token)) - {one.stage for one in jobs_found}
    if lost and all(one.state == "PENDING" for one in jobs_found) and not _begun(book, token):
        _withdraw(book, token, f"the controller lost a part of it: {', '.join(sorted(lost))}")
        return
    _finish(
        book, token, sorted({one.job for one in jobs_found if one.state == "PENDING" and one.reason == "JobHeldUser"})
    )


def _begun(book: Run, token: str) -> bool:
    """Whether a stage of the run, or of an element of the sweep, has begun since the submission."""
    since = next(event["time"] for event in book.ledger() if event["event"] == "submitting" and event["token"] == token)
    runs = elements(book.folder) if (book.folder / SWEEP).exists() else [book]
    return any(event["event"] == "started" and event["time"] >= since for run in runs for event in run.ledger())


@contextlib.contextmanager
def patient(take: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Hold the lock that ``take()`` gives, waiting up to LOCK_S where another command holds it;
    then Busy as it comes."""
    deadline = time.monotonic() + LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(take())
                break
            except Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield


def comment(identity: str, token: str, stage: str) -> str:
    return f"convoy run={identity} submission={token} stage={stage}"


def _sbatch(step: Step, token: str, submitted: dict[str, int]) -> tuple[int, bool]:
    """Queue one step -> its job id, and whether it is held."""
    waits = [submitted[parent] for parent in step.parents if parent in submitted] + [job for _, job in step.waits]
    hold = not any(parent in submitted for parent in step.parents)
    options = [f"--comment={comment(step.identity, token, step.stage)}", "--export=ALL"]
    options += [f"--dependency={step.dependency}:{':'.join(map(str, waits))}"] if waits else []
    options += [f"--array={step.array}"] if step.array else []
    options += ["--hold"] if hold else []
    environ = {name: value for name, value in environment.for_sbatch(step.passed).items() if name not in step.without}
    printed = commands.call("sbatch", "--parsable", *options, str(step.script), environ=environ)
    return job_id(printed) or _queued_as(step, token, printed), hold


def job_id(printed: str) -> int | None:
    """The id in what ``sbatch --parsable`` printed, "123" or "123;cluster"; a site's wrapper may
    print lines around it, in colours. None where there is no such line, or several that differ."""
    plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).strip() for line in printed.splitlines()]
    matches = [re.fullmatch(r"(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?", line) for line in plain]
    ids = {int(match[1]) for match in matches if match}
    return ids.pop() if len(ids) == 1 else None


def _queued_as(step: Step, token: str, printed: str) -> int:
    """The id as the queue shows it: the job carries this submission's token."""
    ids = [one.job for one in tokened(token) if one.stage == step.stage]
    if not ids:
        raise commands.SlurmError(
            f"sbatch printed {printed.strip()[-400:]!r} where a job id was expected, and the queue shows no such job"
        )
    return int(ids[0])


def _finish(book: Run, token: str, held_jobs: list[str]) -> None:
    if held_jobs:
        commands.call("scontrol", "release", ",".join(held_jobs))
    book.record("queued", token=token)


def _withdraw(book: Run, token: str, cause: str) -> None:
    """Cancel every job of the submission, asked for by token: the one whose sbatch never answered,
    too."""
    vanished: dict[str, int] = {}
    deadline, waits = time.monotonic() + commands.TIMEOUT_S, pauses(0.5, 4)
    while alive := {one.stage: one.job for one in tokened(token) if one.state not in ENDED}:
        if time.monotonic() > deadline:
            raise commands.SlurmError(f"scancel {' '.join(alive.values())} had no effect within {commands.TIMEOUT_S} s")
        commands.call("scancel", *sorted(set(alive.values())))
        vanished = {stage: int(job) for stage, job in alive.items()} | vanished
        time.sleep(next(waits))
    order = _stages(book, token)
    book.record(
        "withdrawn", token=token, jobs={stage: vanished[stage] for stage in order if stage in vanished}, cause=cause
    )


def _last(book: Run) -> dict:
    """The ledger's last word on a submission; {"event": ""} before the first."""
    kinds = ("submitting", "committed", "queued", "withdrawn")
    events = [event for event in book.ledger() if event["event"] in kinds and "token" in event]
    return events[-1] if events else {"event": ""}


def _open(book: Run, event: str, token: str) -> bool:
    last = _last(book)
    return last["event"] == event and last["token"] == token


def _stages(book: Run, token: str) -> list[str]:
    return next(
        event["stages"] for event in book.ledger() if event["event"] == "submitting" and event["token"] == token
    )


@contextlib.contextmanager
def _guarded(book: Run) -> Iterator[subprocess.Popen]:
    """A process that settles the submission unless it is told that all is well before this end of
    its pipe closes."""
    with open(book.folder / "submit.log", "a", encoding="utf-8") as log:
        guard = subprocess.Popen(
            run_module.command("launcher.slurm.transaction", str(book.folder)),
            env=environment.outside(),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            bufsize=0,
        )
    try:
        yield guard
    finally:
        guard.stdin.close()


def main(arguments: list[str]) -> int:
    """The guard: wait for the submitter's end; exit 1 where Slurm never answered."""
    ended = usage(arguments, "launcher.slurm.transaction", "FOLDER", __doc__)
    if ended is not None:
        return ended
    if sys.stdin.buffer.read() == DONE:
        return 0
    book, deadline = Run(Path(arguments[0])), time.monotonic() + GUARD_S
    while time.monotonic() < deadline:
        try:
            with book.lock():
                settle(book)
            return 0
        except Busy:
            pass  # a command on this run: it settles first
        except (commands.SlurmError, OSError) as error:
            print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {error}", flush=True)
        time.sleep(ASK_EVERY_S)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
