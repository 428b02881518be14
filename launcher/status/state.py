"""What each stage of a run is doing. Order of truth: DONE.json and ledger, status.json, the queue
by name and comment, the accounting; never a bare id."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launcher.config.stages import Stage
from launcher.job import advice, requeue, slurm_action
from launcher.run import manifest, progress
from launcher.run.folder import Run, is_alive
from launcher.run.manifest import Refused
from launcher.run.progress import Progress
from launcher.slurm.polling import Queue
from launcher.slurm.queue import Job
from launcher.status.terminal import plain
from training.errors import ConfigError
from training.files.safe_files import Unfit, read_tail

SILENT_S = 120
"""A running trainer that logged nothing for so long, and for five iterations' time, is pointed
out."""
LAST_LINES = 8
OUTPUT_BYTES = 1 << 16
"""Of the end of a job's own output, so much is read."""
UNSTARTED = "mend what its batch script stumbled over (modules, setup or container of the profile?), then resume"
BAD = ("failed", "cancelled", "stopped", "lost")
ACTIVE = ("running", "pending", "requeued")


@dataclass
class StageState:
    stage: str
    state: str
    """not submitted, pending, running, requeued, done, failed, cancelled, stopped or lost."""
    why: str = ""
    """Why it waits or how it ended, in words."""
    job: int | None = None
    attempt: int = 0
    progress: Progress = field(default_factory=Progress)
    starts: float | None = None
    """When Slurm expects a pending job to start, seconds since 1970; None where it does not say."""
    started: float | None = None
    ended: float | None = None
    nodes: str = ""
    kind: str = ""
    """Class of the ending: "cuda oom", "time limit", ...; "" while there is none."""
    advice: str = ""
    rank: int | None = None
    """The rank that failed first."""
    lines: list[str] = field(default_factory=list)
    """The last lines of that rank."""
    previous: dict | None = None
    """Why the stage was queued again, while it waits and while the next attempt runs: {"attempt",
    "class", "cause", "iteration", "time"} of the last attempt that ended."""

    @property
    def word(self) -> str:
        """The state for a person: a health gate's ending is no failure."""
        if self.state == "failed" and self.kind == "health gate":
            return "stopped" if "stopped by a health gate" in self.why else "paused"
        return self.state


@dataclass
class Look:
    """One look at a run."""

    run: Run
    stages: list[StageState]
    trouble: str = ""
    """Why the queue could not be asked; "" when it was, or when none is needed."""
    stop: bool = False
    """Whether the file STOP is in the run folder."""
    data: list[str] = field(default_factory=list)
    """What was dropped and cut of the rows, a line each."""

    @property
    def overall(self) -> str:
        return overall(self.stages)


def look(run: Run) -> Look:
    return look_at([run])[0]


def look_at(runs: list[Run], queue: Queue | None = None, broken: list[str] | None = None) -> list[Look]:
    """One look at each of the runs; ``queue``, of a command that looks again and again, knows
    when Slurm is to be asked.

    There is one question to the queue for all, and one to the accounting where the queue has
    forgotten. A run whose files can't be understood is left out and named in ``broken``; without
    such a list it is a ConfigError.
    """
    queue, trying = queue or Queue(), Trying(broken)
    files = {run: one for run in runs if (one := trying.of(run, lambda: Files(run)))}  # noqa: B023 - called at once
    asked = [run for run, one in files.items() if one.slurm]
    known = queue.of(
        asked,
        tuple(files[run].news for run in asked),
        lambda jobs: {run: names for run in asked if (names := files[run].forgotten(jobs.get(run.id, {})))},
    )
    seen = [
        trying.of(run, lambda: _look(one, known.get(run.id, {}), plain(queue.trouble) if one.slurm else ""))  # noqa: B023
        for run, one in files.items()
    ]
    return [one for one in seen if one]


class Trying:
    """Reads runs of which some may be damaged."""

    def __init__(self, broken: list[str] | None):
        self.broken = broken

    def of(self, run: Run, read: Callable):
        """What ``read()`` returns; None where the run is broken, or ConfigError."""
        try:
            return read()
        except ConfigError as error:
            words = str(error)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            words = f"{run.folder} can't be read, a file of it is damaged: {type(error).__name__}: {error}"
        if self.broken is None:
            raise ConfigError(words)
        self.broken.append(words)
        return None


def _look(files: Files, known: dict[str, Job], trouble: str) -> Look:
    run = files.run
    return Look(
        run,
        [_state(files, stage, known.get(name), trouble) for name, stage in run.stages.items()],
        trouble,
        (run.folder / "STOP").exists(),
        run.data_summary().get("lines", []),
    )


def states(run: Run) -> tuple[list[StageState], str]:
    """The state of every stage, and why the queue could not be asked ("" when it was, or when none
    is needed)."""
    found = look(run)
    return found.stages, found.trouble


def overall(found: Iterable[StageState]) -> str:
    """ "done", "failed" (one failed, was cancelled, stopped or lost), "idle" (some are left and
    nobody works on them) or "running"."""
    kinds = {state.state for state in found}
    if kinds == {"done"}:
        return "done"
    if kinds & set(BAD):
        return "failed"
    return "idle" if kinds <= {"done", "not submitted"} else "running"


def busy(run: Run) -> list[str]:
    """Stages that run or are queued."""
    return [row.stage for row in states(run)[0] if row.state in ACTIVE]


def as_json(seen: Iterable[Look]) -> list[dict]:
    """One table a stage, each with its run's name and id; times are seconds since 1970, ``trouble``
    is why the queue wasn't asked."""
    made = []
    for one in seen:
        shared = {"run": one.run.folder.name, "id": one.run.id, "folder": str(one.run.folder), "trouble": one.trouble}
        for row in one.stages:
            table = asdict(row)
            far = table.pop("progress")
            table["class"] = table.pop("kind")
            made.append({**shared, **table, **far})
    return made


class Files:
    """What a run's folder says; each file is read once."""

    def __init__(self, run: Run):
        self.run = run
        self.ledger = run.ledger()
        self.status = {name: run.status(name) for name in run.stages}
        self.slurm = run.uses_slurm()
        self.runner = run.runner()
        self.disowned = run.disowned()
        try:
            self.left, self.damaged = {stage.name for stage in manifest.left(run, list(run.stages.values()))}, ""
        except Refused as error:
            self.left, self.damaged = set(run.stages), str(error)

    @property
    def news(self) -> tuple:
        """Differs where the files tell something new of jobs: progress of an iteration is none."""
        return len(self.ledger), tuple(status["state"] for status in self.status.values()), frozenset(self.left)

    def last_event(self, stage: str) -> dict | None:
        """The last ledger event of a stage that says where it stands."""
        return next(
            (event for event in reversed(self.ledger) if event.get("stage") == stage and event["event"] in STANDING),
            None,
        )

    def forgotten(self, known: dict[str, Job]) -> set[str]:
        """Stages that the files believe to be with Slurm while squeue shows no job of them."""
        return {
            name
            for name in self.left
            if name not in known
            and (
                self.status[name]["state"] in ("running", "requeued")
                and self.status[name].get("job")
                or (last := self.last_event(name))
                and last["event"] == "submitted"
            )
        }


WORDS = ("why", "nodes", "kind", "advice")
"""Of a StageState, what others wrote a part of."""
STANDING = ("submitted", "started", "requeued", "done", "failed", "cancelled", "stopped", "rewound", "set aside")


def _state(files: Files, stage: Stage, job: Job | None, trouble: str) -> StageState:
    name, status = stage.name, files.status[stage.name]
    if job and job.id in files.disowned:
        job = None
    made = StageState(
        name,
        "",
        attempt=status["attempt"],
        job=job.id if job else status.get("job"),
        started=status.get("started"),
        ended=status.get("ended"),
        progress=progress.read(files.run, stage, status.get("started") or 0),
    )
    made.state, made.why = ("done", "") if name not in files.left else _undone(files, stage, job, trouble)
    if made.state in BAD and made.why != status.get("cause") and job and not job.alive:
        made.lines = _output(files.run, name, job.handle)[
            -LAST_LINES:
        ]  # what status.json tells is of an attempt before
        made.kind = (
            slurm_action.STATES[job.state].value
            if job.state in slurm_action.STATES and job.state != "CANCELLED"
            else ""
        )
        made.advice = UNSTARTED if made.lines and job.state == "FAILED" else advice.of(made.kind, name)
    elif made.state in BAD:
        made.kind, made.advice = status.get("class") or "", status.get("advice") or ""
        made.rank, made.lines = status.get("rank"), list(status.get("lines") or [])
    if made.state in ACTIVE:
        made.previous = _previous(files, name)
    if job and job.alive and made.state != "done":
        made.nodes, made.starts = job.nodes, job.starts if job.pending else None
    if made.state != "running":
        made.progress = replace(made.progress, eta_s=None, speed=None, tokens_per_s=None)
    elif not made.why:
        made.why = _silence(made)
    return replace(made, lines=list(map(plain, made.lines)), **{key: plain(getattr(made, key)) for key in WORDS})


def _undone(files: Files, stage: Stage, job: Job | None, trouble: str) -> tuple[str, str]:
    """(state, why) of a stage without a valid manifest."""
    status, last = files.status[stage.name], files.last_event(stage.name)
    parents = ", ".join(parent for parent in stage.parents if parent in files.left)
    if job and job.alive and job.source == "squeue":
        if job.pending:
            again = status["state"] == "requeued" or (status["state"] == "running" and status.get("job") == job.id)
            return ("requeued" if again else "pending"), job.waits(parents, str(files.run.folder))
        if status["state"] not in BAD or status.get("job") != job.id or last is None or last["event"] not in BAD:
            return "running", "" if job.state == "RUNNING" else f"Slurm says {job.state.lower()}"
    if status["state"] == "running":
        return _silent(files, stage.name, status, job, trouble)
    if files.runner and stage.name in files.runner["stages"] and files.runner["time"] >= (status.get("ended") or 0):
        return "pending", f"waits for {parents}" if parents else "starts now"
    if files.damaged and (files.run.stage(stage.name) / "DONE.json").exists():
        return "failed", files.damaged
    again = last is not None and last["event"] in ("submitted", "rewound", "set aside")
    if status["state"] in BAD and not again:
        return status["state"], status["cause"]
    if job and not job.alive and not (again and last.get("job", 0) > job.id):
        return _ended_unstarted(files, stage.name, job, parents)
    if status["state"] == "requeued" and not again:
        return (
            _unseen(files, stage.name, status, job, trouble)
            if status["job"]
            else ("failed", f"{status['cause']}, but nobody does it")
        )
    if last and last["event"] == "submitted" and last["job"] not in files.disowned:
        return _unseen(files, stage.name, last, job, trouble)
    return "not submitted", ""


def _previous(files: Files, stage: str) -> dict | None:
    """How the last attempt ended after which the stage was queued again, since it was last
    submitted or resumed."""
    status, ends = files.status[stage], requeue.history_of(files.ledger, stage).ends
    if status["state"] == "requeued" and not (ends and ends[-1].get("attempt") == status["attempt"]):
        ends = (status,)  # Slurm killed the supervisor before it could write into the ledger
    if not ends:
        return None
    last = ends[-1]
    row = {name: last.get(name) for name in ("attempt", "class", "cause", "iteration")}
    return {**row, "time": last.get("time", last.get("updated"))}


def _silent(files: Files, stage: str, status: dict, job: Job | None, trouble: str) -> tuple[str, str]:
    """A stage whose status.json says running while the queue shows no live job."""
    if job and not job.alive:
        how = f"job {job.id}: {job.ending}" + _last_output(files.run, stage, job.handle)
    elif status["job"]:
        if trouble:
            return "running", "as last heard of: the queue can't be asked"
        how = f"job {status['job']} is gone from the queue" + (f"; sacct still says {job.state}" if job else "")
        how += _last_output(files.run, stage, str(status["job"]))
    elif is_alive(status):
        return "running", ""
    else:
        how = f"process {status['pid']} is gone" + _last_output(files.run, stage, "")
    return (
        "failed",
        f"ended without a last word: {how}; python -m launcher resume {files.run.folder} goes on from its last checkpoint",
    )


def _ended_unstarted(files: Files, stage: str, job: Job, parents: str) -> tuple[str, str]:
    """A job that ended and left no word of its own."""
    if job.state == "CANCELLED":
        if files.run.cancelled_since(0, job.id):
            return "cancelled", f"job {job.id} was cancelled with the run (python -m launcher cancel)"
        because = f" or because {parents} did not finish" if parents else ""
        return "cancelled", f"job {job.id} was cancelled by hand{because}"
    return "failed", f"job {job.id}: {job.ending}{_last_output(files.run, stage, job.handle)}"


def _unseen(files: Files, stage: str, last: dict, job: Job | None, trouble: str) -> tuple[str, str]:
    """Submitted, never started, and the queue shows no job of it."""
    if trouble:
        return "pending", f"job {last['job']} as last heard of: the queue can't be asked"
    if files.run.cancelled_since(last.get("time", 0), last["job"]):
        return "cancelled", f"job {last['job']} was cancelled with the run (python -m launcher cancel)"
    if job:
        return "lost", (
            f"job {job.id} is not in the queue, though sacct still says {job.state}; "
            f"queue it again: python -m launcher resume {files.run.folder}"
        )
    return "lost", (
        f"job {last['job']} is not in the queue any more{_last_output(files.run, stage, str(last['job']))}; "
        f"queue it again: python -m launcher resume {files.run.folder}"
    )


def _last_output(run: Run, stage: str, job: str) -> str:
    """What the job's own output ends with: the last word of a supervisor that could not write
    status.json, or of Slurm."""
    lines = _output(run, stage, job)
    return f" ({_log(run, stage, job)} ends: {lines[-1].strip()})" if lines else ""


def _log(run: Run, stage: str, job: str) -> Path:
    return run.stage(stage) / "logs" / (f"slurm-{job}.out" if job else "supervise.log")


def _output(run: Run, stage: str, job: str) -> list[str]:
    """The lines of the supervisor's own output that are not empty; ``job``: an id, an array's
    element, "" locally."""
    try:
        lines = read_tail(_log(run, stage, job), OUTPUT_BYTES)[0].decode(errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError, Unfit):
        return []
    return [line.rstrip() for line in lines if line.strip()]


def _silence(made: StageState) -> str:
    """What to say of a running trainer that has logged nothing for long."""
    far, now = made.progress, time.time()
    if far.logged is None or made.started is None:
        return ""
    quiet = now - max(far.logged, made.started)
    if quiet > SILENT_S and quiet > 5 / (far.speed or 1):
        return f"no iteration logged for {quiet / 60:.0f} minutes"
    return ""
