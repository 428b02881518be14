"""What each stage of a run is doing. Order of truth: DONE.json and ledger, status.json, the queue by comment; never a bare id."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from launcher import manifest, probe
from launcher.pipeline import STAGES, Stage
from launcher.run import Run, is_alive

TAIL_BYTES = 32_768
REASONS = {
    "Priority": "jobs of higher priority come first",
    "Resources": "the nodes it needs are busy",
    "JobHeldUser": "held: scontrol release JOB",
    "JobHeldAdmin": "held by the site's administrators",
    "BeginTime": "queued again, Slurm holds it back for a moment",
    "PartitionTimeLimit": "asks for more time than its partition gives: it will never start",
    "PartitionNodeLimit": "asks for more nodes than its partition gives: it will never start",
    "QOSMaxJobsPerUserLimit": "your limit of running jobs is reached",
    "DependencyNeverSatisfied": "its parent failed, so it will never start; queue it again: python -m launcher resume RUN",
    "None": "just queued",
}
ENDED_IN_QUEUE = {
    "TIMEOUT": "reached its time limit before it could save",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "the node ran out of memory",
    "CANCELLED": "cancelled",
}
BAD = ("failed", "cancelled", "lost")
FINAL = ("done", *BAD)


@dataclass
class StageState:
    stage: str
    state: str
    """not submitted, pending, running, requeued, done, failed, cancelled or lost."""
    why: str = ""
    """Why it waits or how it ended, in words."""
    job: int | None = None
    attempt: int = 0
    iteration: int | None = None
    total: int | None = None
    eta_s: float | None = None
    numbers: dict = field(default_factory=dict)
    started: float | None = None
    ended: float | None = None


def states(run: Run) -> tuple[list[StageState], str]:
    """The state of every stage, and why the queue could not be asked ("" when it was, or when none is needed)."""
    jobs, trouble = {}, ""
    if run.uses_slurm():
        try:
            jobs = probe.jobs(run.id)
        except probe.SlurmError as error:
            trouble = str(error)
    left = {stage.name for stage in manifest.left(run, list(STAGES.values()))}
    runner = run.runner()
    return [_state(run, stage, stage.name in left, jobs.get(stage.name), runner, trouble) for stage in STAGES.values()], trouble


def overall(found: list[StageState]) -> str:
    """"done", "failed" (one failed, was cancelled or lost), "idle" (some are left and nobody works on them) or "running"."""
    kinds = {state.state for state in found}
    if kinds == {"done"}:
        return "done"
    if kinds & set(BAD):
        return "failed"
    return "idle" if kinds <= {"done", "not submitted"} else "running"


def as_json(found: list[StageState]) -> list[dict]:
    return [asdict(state) for state in found]


def _state(run: Run, stage: Stage, left: bool, job: probe.Job | None, runner: dict | None, trouble: str) -> StageState:
    status = run.status(stage.name)
    made = StageState(stage.name, "", attempt=status["attempt"], job=job.id if job else status.get("job"),
                      started=status.get("started"), ended=status.get("ended"))
    progress(run, stage, made)
    made.state, made.why = ("done", "") if not left else _undone(run, stage, status, job, runner, trouble)
    if made.state != "running":
        made.eta_s = None
    return made


def _undone(run: Run, stage: Stage, status: dict, job: probe.Job | None, runner: dict | None, trouble: str) -> tuple[str, str]:
    """(state, why) of a stage without a valid manifest."""
    parents = ", ".join(stage.parents)
    if job and job.alive:
        if job.state == "PENDING":
            why = f"waits for {parents}" if job.reason == "Dependency" else REASONS.get(job.reason, job.reason)
            return ("requeued" if status["state"] == "requeued" else "pending"), why
        return "running", "" if job.state == "RUNNING" else job.state.lower()
    if status["state"] == "running":
        if trouble:
            return "running", "as last heard of: the queue can't be asked"
        if status["job"] is None and is_alive(status):
            return "running", ""
        gone = f"job {status['job']} is gone from the queue" if status["job"] else f"process {status['pid']} is gone"
        how = ENDED_IN_QUEUE.get(job.state, job.state) if job else gone
        return "failed", f"ended without a last word: {how}; python -m launcher resume {run.folder} goes on from its last checkpoint"
    last = _last_event(run, stage.name)
    if runner and stage.name in runner["stages"] and runner["time"] >= (status.get("ended") or 0):
        return "pending", f"waits for {parents}" if parents else "starts now"
    if status["state"] in ("failed", "cancelled", "requeued") and (last is None or last["event"] != "submitted"):
        return status["state"], status["cause"]
    if job:
        if job.state == "CANCELLED" and stage.parents:
            return "cancelled", f"cancelled with job {job.id}, by hand or because {parents} did not finish"
        return "failed", f"job {job.id}: {ENDED_IN_QUEUE.get(job.state, job.state)}"
    if last and last["event"] == "submitted":
        if trouble:
            return "pending", f"job {last['job']} as last heard of: the queue can't be asked"
        return "lost", (f"job {last['job']} is not in the queue any more and never started; "
                        f"queue it again: python -m launcher resume {run.folder}")
    return "not submitted", ""


def _last_event(run: Run, stage: str) -> dict | None:
    """The last ledger event of a stage that says where it stands."""
    events = [event for event in run.ledger() if event.get("stage") == stage]
    return events[-1] if events else None


def progress(run: Run, stage: Stage, made: StageState) -> None:
    """Iteration, total, key numbers and time left from the end of metrics.jsonl."""
    rows = _rows(run, stage.name)
    if not rows:
        return
    made.iteration, made.total = rows[-1]["iteration"], rows[-1]["total"]
    for name in stage.key_numbers:
        values = [row[name] for row in rows if name in row]
        if values:
            made.numbers[name] = values[-1]
    first = next((row for row in rows if row["time"] >= (made.started or 0)), rows[-1])
    done, seconds = rows[-1]["iteration"] - first["iteration"], rows[-1]["time"] - first["time"]
    if done > 0 and seconds > 0:
        made.eta_s = (made.total - made.iteration) * seconds / done


def _rows(run: Run, stage: str) -> list[dict]:
    """The last whole rows of metrics.jsonl that lie in its last TAIL_BYTES."""
    try:
        with open(run.stage(stage) / "metrics.jsonl", "rb") as file:
            file.seek(0, 2)
            start = max(0, file.tell() - TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    whole = lines[1 if start else 0:-1]
    return [row for row in map(json.loads, whole) if "iteration" in row and "total" in row]
