"""What each stage of a run is doing: a StageState, with its progress, its end and what to do.

launcher/status/evidence.py decides the state itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace

from launcher.config.stages import Stage
from launcher.job import advice, requeue, slurm_action
from launcher.run import progress
from launcher.run.folder import Run
from launcher.run.progress import Progress
from launcher.slurm.polling import Queue
from launcher.slurm.queue import Job
from launcher.status.evidence import ACTIVE, BAD, Evidence, RunRecords, judge
from launcher.status.job_output import last_lines
from launcher.status.terminal import plain
from training.errors import ConfigError

SILENT_S = 120
"""A note names a running trainer that logged nothing for so long, and for five iterations' time."""
LAST_LINES = 8
"""Most lines of the failing rank that are shown."""
UNSTARTED = "mend what its batch script stumbled over (modules, setup or container of the profile?), then resume"


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
    def state_word(self) -> str:
        """The state for a person: a health gate's ending is no failure."""
        if self.state == "failed" and self.kind == "health gate":
            return "stopped" if "stopped by a health gate" in self.why else "paused"
        return self.state


@dataclass
class RunStatus:
    """What a run was doing when it was read."""

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


def status_of(run: Run) -> RunStatus:
    return statuses_of([run])[0]


def statuses_of(runs: list[Run], queue: Queue | None = None, broken: list[str] | None = None) -> list[RunStatus]:
    """The status of each run.

    Slurm's queue is asked once for all runs, and its accounting once where the queue has forgotten
    a job. ``queue``: a command that calls this again and again passes the same one, which knows
    when Slurm is to be asked. A run whose files can't be understood is left out and named in
    ``broken``; without such a list it is a ConfigError.
    """
    queue, reader = queue or Queue(), RunReader(broken)
    records = {run: one for run in runs if (one := reader.read(run, RunRecords, run))}
    with_slurm = [run for run, one in records.items() if one.slurm]
    jobs = queue.of(
        with_slurm,
        tuple(records[run].version for run in with_slurm),
        lambda jobs: {
            run: names for run in with_slurm if (names := records[run].missing_from_queue(jobs.get(run.id, {})))
        },
    )
    statuses = [
        reader.read(run, _run_status, one, jobs.get(run.id, {}), plain(queue.trouble) if one.slurm else "")
        for run, one in records.items()
    ]
    return [status for status in statuses if status]


class RunReader:
    """Reads runs of which some may be damaged."""

    def __init__(self, broken: list[str] | None):
        self.broken = broken

    def read(self, run: Run, function: Callable, *arguments):
        """What ``function(*arguments)`` returns. Where the run is broken: None, or ConfigError
        without a list ``broken``."""
        try:
            return function(*arguments)
        except ConfigError as error:
            message = str(error)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            message = f"{run.folder} can't be read, a file of it is damaged: {type(error).__name__}: {error}"
        if self.broken is None:
            raise ConfigError(message)
        self.broken.append(message)
        return None


def _run_status(records: RunRecords, jobs: dict[str, Job], trouble: str) -> RunStatus:
    run = records.run
    return RunStatus(
        run,
        [_stage_state(records, stage, jobs.get(name), trouble) for name, stage in run.stages.items()],
        trouble,
        (run.folder / "STOP").exists(),
        run.data_summary().get("lines", []),
    )


def overall(stages: Iterable[StageState]) -> str:
    """The state of several stages together.

    "done"; "failed" (one failed, was cancelled, stopped or lost); "idle" (some are not done and no
    process or job works on them); or "running".
    """
    states = {stage.state for stage in stages}
    if states == {"done"}:
        return "done"
    if states & set(BAD):
        return "failed"
    return "idle" if states <= {"done", "not submitted"} else "running"


def active_stages(run: Run) -> list[str]:
    """Stages that run or are queued."""
    return [row.stage for row in status_of(run).stages if row.state in ACTIVE]


def as_json(statuses: Iterable[RunStatus]) -> list[dict]:
    """One table a stage, each with its run's name and id.

    Times are seconds since 1970. ``trouble`` is why the queue wasn't asked.
    """
    tables = []
    for status in statuses:
        run = status.run
        shared = {"run": run.folder.name, "id": run.id, "folder": str(run.folder), "trouble": status.trouble}
        for row in status.stages:
            table = asdict(row)
            progress_table = table.pop("progress")
            table["class"] = table.pop("kind")
            tables.append({**shared, **table, **progress_table})
    return tables


FOREIGN_TEXTS = ("why", "nodes", "kind", "advice")
"""Fields of a StageState that other programs or people wrote a part of."""


def _stage_state(records: RunRecords, stage: Stage, job: Job | None, trouble: str) -> StageState:
    name, status = stage.name, records.status[stage.name]
    if job and job.id in records.disowned:
        job = None
    row = StageState(
        name,
        "",
        attempt=status["attempt"],
        job=job.id if job else status.get("job"),
        started=status.get("started"),
        ended=status.get("ended"),
        progress=progress.read(records.run, stage, status.get("started") or 0),
    )
    done = name not in records.left
    row.state, row.why = ("done", "") if done else judge(Evidence(records, stage, job, trouble))
    if row.state in BAD:
        _add_ending(row, records, job)
    if row.state in ACTIVE:
        row.previous = _previous(records, name)
    if job and job.alive and row.state != "done":
        row.nodes, row.starts = job.nodes, job.starts if job.pending else None
    if row.state != "running":
        row.progress = replace(row.progress, eta_s=None, speed=None, tokens_per_s=None)
    elif not row.why:
        row.why = _silence(row)
    texts = {name: plain(getattr(row, name)) for name in FOREIGN_TEXTS}
    return replace(row, lines=list(map(plain, row.lines)), **texts)


def _add_ending(row: StageState, records: RunRecords, job: Job | None) -> None:
    """The class of the ending, what to do about it, and the last lines."""
    status = records.status[row.stage]
    # status.json is of an earlier attempt
    if row.why != status.get("cause") and job and not job.alive:
        row.lines = last_lines(records.run, row.stage, job.handle)[-LAST_LINES:]
        if job.state in slurm_action.STATES and job.state != "CANCELLED":
            row.kind = slurm_action.STATES[job.state].value
        row.advice = UNSTARTED if row.lines and job.state == "FAILED" else advice.of(row.kind, row.stage)
    else:
        row.kind, row.advice = status.get("class") or "", status.get("advice") or ""
        row.rank, row.lines = status.get("rank"), list(status.get("lines") or [])


def _previous(records: RunRecords, stage: str) -> dict | None:
    """How the last attempt ended after which the stage was queued again, since it was last
    submitted or resumed."""
    status, ends = records.status[stage], requeue.history_of(records.ledger, stage).ends
    if status["state"] == "requeued" and not (ends and ends[-1].get("attempt") == status["attempt"]):
        ends = (status,)  # Slurm killed the supervisor before it could write into the ledger
    if not ends:
        return None
    last = ends[-1]
    row = {name: last.get(name) for name in ("attempt", "class", "cause", "iteration")}
    return {**row, "time": last.get("time", last.get("updated"))}


def _silence(row: StageState) -> str:
    """What to say of a running trainer that has logged nothing for long."""
    logged, speed, now = row.progress.logged, row.progress.speed, time.time()
    if logged is None or row.started is None:
        return ""
    quiet = now - max(logged, row.started)
    if quiet > SILENT_S and quiet > 5 / (speed or 1):
        return f"no iteration logged for {quiet / 60:.0f} minutes"
    return ""
