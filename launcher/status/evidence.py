"""From what the files and the queue say of a stage to its state: one table of rules, RULES.

Order of truth: DONE.json and the ledger, status.json, the queue by name and comment, the
accounting. A bare job id proves nothing: Slurm uses ids again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from launcher.config.stages import Stage
from launcher.run import manifest
from launcher.run.folder import Run, is_alive
from launcher.slurm.queue import Job
from launcher.status.job_output import last_line_note

BAD = ("failed", "cancelled", "stopped", "lost")
ACTIVE = ("running", "pending", "requeued")
STATE_EVENTS = ("submitted", "started", "requeued", "done", "failed", "cancelled", "stopped", "rewound", "set aside")
"""Ledger events that say where a stage stands."""
RESTART_EVENTS = ("submitted", "rewound", "set aside")
"""Those after which an earlier ending counts no more."""


class RunRecords:
    """What a run's folder says; each file is read once."""

    def __init__(self, run: Run):
        self.run = run
        self.ledger = run.ledger()
        self.status = {name: run.status(name) for name in run.stages}
        self.slurm = run.uses_slurm()
        self.runner = run.runner()
        self.disowned = run.disowned()
        self.damaged: dict[str, str] = {}
        """Stage -> what is wrong with its DONE.json."""
        self.left = {stage.name for stage in manifest.left(run, list(run.stages.values()), self.damaged)}
        """Stages that are not done."""

    @property
    def version(self) -> tuple:
        """Differs where the files tell something new of jobs. Progress of an iteration is nothing
        new."""
        return len(self.ledger), tuple(status["state"] for status in self.status.values()), frozenset(self.left)

    def last_event(self, stage: str) -> dict | None:
        """The last ledger event of a stage that says where it stands."""
        return next(
            (
                event
                for event in reversed(self.ledger)
                if event.get("stage") == stage and event["event"] in STATE_EVENTS
            ),
            None,
        )

    def missing_from_queue(self, jobs: dict[str, Job]) -> set[str]:
        """Stages that the files believe to be with Slurm while squeue shows no job of them."""
        return {
            name
            for name in self.left
            if name not in jobs
            and (
                self.status[name]["state"] in ("running", "requeued")
                and self.status[name].get("job")
                or (last := self.last_event(name))
                and last["event"] == "submitted"
            )
        }

    def damage(self, stage: Stage) -> str:
        """Why a stage with a DONE.json can't be called done: its own is damaged, or that of a stage
        that it was built from; "" where none is."""
        if stage.name in self.damaged:
            return self.damaged[stage.name]
        if not (self.run.stage(stage.name) / "DONE.json").exists():
            return ""
        for parent in stage.parents:
            if reason := self.damage(self.run.stages[parent]):
                return reason if parent not in self.damaged else f"it was built from {parent}: {reason}"
        return ""


@dataclass(frozen=True)
class Evidence:
    """What is known of a stage that has no valid manifest."""

    records: RunRecords
    stage: Stage
    job: Job | None
    """Its job in squeue or sacct."""
    trouble: str
    """Why the queue could not be asked; "" when it was."""

    @property
    def run(self) -> Run:
        return self.records.run

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def status(self) -> dict:
        return self.records.status[self.name]

    @property
    def last(self) -> dict | None:
        return self.records.last_event(self.name)

    @property
    def parents(self) -> str:
        """Its parents that are not done."""
        return ", ".join(parent for parent in self.stage.parents if parent in self.records.left)

    @property
    def in_queue(self) -> bool:
        return bool(self.job and self.job.alive and self.job.source == "squeue")

    @property
    def end_recorded(self) -> bool:
        """Whether the job's supervisor has written how it ended, though squeue still shows the
        job."""
        return bool(
            self.status["state"] in BAD
            and self.status.get("job") == self.job.id
            and self.last
            and self.last["event"] in BAD
        )

    @property
    def restarted(self) -> bool:
        """Whether the stage was submitted or set back after what status.json says."""
        return self.last is not None and self.last["event"] in RESTART_EVENTS

    @property
    def job_ended(self) -> bool:
        """Whether its newest job has ended."""
        superseded = self.restarted and self.job and self.last.get("job", 0) > self.job.id
        return bool(self.job and not self.job.alive and not superseded)

    @property
    def runner_comes(self) -> bool:
        """Whether a process on a machine works on the run and has this stage before it."""
        runner = self.records.runner
        return bool(runner and self.name in runner["stages"] and runner["time"] >= (self.status.get("ended") or 0))

    @property
    def submitted(self) -> bool:
        return bool(self.last and self.last["event"] == "submitted" and self.last["job"] not in self.records.disowned)

    def output(self, job: str) -> str:
        return last_line_note(self.run, self.name, job)


def _waits_in_queue(evidence: Evidence) -> tuple[str, str]:
    status, job = evidence.status, evidence.job
    requeued = status["state"] == "requeued" or (status["state"] == "running" and status.get("job") == job.id)
    return ("requeued" if requeued else "pending"), job.waits(evidence.parents, str(evidence.run.folder))


def _runs_in_queue(evidence: Evidence) -> tuple[str, str]:
    state = evidence.job.state
    return "running", "" if state == "RUNNING" else f"Slurm says {state.lower()}"


def _running_but_not_in_queue(evidence: Evidence) -> tuple[str, str]:
    """status.json says running while the queue shows no live job."""
    status, job, run = evidence.status, evidence.job, evidence.run
    if job and not job.alive:
        how = f"job {job.id}: {job.ending}" + evidence.output(job.handle)
    elif status["job"]:
        if evidence.trouble:
            return "running", "as last heard of: the queue can't be asked"
        how = f"job {status['job']} is gone from the queue" + (f"; sacct still says {job.state}" if job else "")
        how += evidence.output(str(status["job"]))
    elif is_alive(status):
        return "running", ""
    else:
        how = f"process {status['pid']} is gone" + evidence.output("")
    resume = f"python -m launcher resume {run.folder} goes on from its last checkpoint"
    return "failed", f"ended without a last word: {how}; {resume}"


def _waits_for_runner(evidence: Evidence) -> tuple[str, str]:
    return "pending", f"waits for {evidence.parents}" if evidence.parents else "starts now"


def _ended_before_start(evidence: Evidence) -> tuple[str, str]:
    """A job that ended before its supervisor wrote anything."""
    job = evidence.job
    if job.state != "CANCELLED":
        return "failed", f"job {job.id}: {job.ending}{evidence.output(job.handle)}"
    if evidence.run.cancelled_since(0, job.id):
        return "cancelled", f"job {job.id} was cancelled with the run (python -m launcher cancel)"
    cause = f" or because {evidence.parents} did not finish" if evidence.parents else ""
    return "cancelled", f"job {job.id} was cancelled by hand{cause}"


def _not_in_queue(evidence: Evidence, record: dict) -> tuple[str, str]:
    """Submitted, never started, and the queue shows no job of it. ``record``: status.json or the
    ledger's event, whichever names its job."""
    run, job = evidence.run, evidence.job
    if evidence.trouble:
        return "pending", f"job {record['job']} as last heard of: the queue can't be asked"
    if run.cancelled_since(record.get("time", 0), record["job"]):
        return "cancelled", f"job {record['job']} was cancelled with the run (python -m launcher cancel)"
    resume = f"queue it again: python -m launcher resume {run.folder}"
    if job:
        return "lost", f"job {job.id} is not in the queue, though sacct still says {job.state}; {resume}"
    output = evidence.output(str(record["job"]))
    return "lost", f"job {record['job']} is not in the queue any more{output}; {resume}"


class Rule(NamedTuple):
    name: str
    holds: Callable[[Evidence], bool]
    conclude: Callable[[Evidence], tuple[str, str]]
    """(state, why)."""


RULES = (
    Rule("its job waits in the queue", lambda it: it.in_queue and it.job.pending, _waits_in_queue),
    Rule("its job runs", lambda it: it.in_queue and not it.end_recorded, _runs_in_queue),
    Rule("it should run", lambda it: it.status["state"] == "running", _running_but_not_in_queue),
    Rule("a local runner comes to it", lambda it: it.runner_comes, _waits_for_runner),
    Rule(
        "a manifest is damaged",
        lambda it: bool(it.records.damage(it.stage)),
        lambda it: ("failed", it.records.damage(it.stage)),
    ),
    Rule(
        "its supervisor wrote a bad end",
        lambda it: it.status["state"] in BAD and not it.restarted,
        lambda it: (it.status["state"], it.status["cause"]),
    ),
    Rule("its job ended before its start", lambda it: it.job_ended, _ended_before_start),
    Rule(
        "a requeued job is missing",
        lambda it: it.status["state"] == "requeued" and not it.restarted and bool(it.status["job"]),
        lambda it: _not_in_queue(it, it.status),
    ),
    Rule(
        "a retry has no process",
        lambda it: it.status["state"] == "requeued" and not it.restarted,
        lambda it: ("failed", f"{it.status['cause']}, but no process does it"),
    ),
    Rule("a submitted job is missing", lambda it: it.submitted, lambda it: _not_in_queue(it, it.last)),
    Rule("none of these", lambda it: True, lambda it: ("not submitted", "")),
)
"""The first rule that holds decides."""


def judge(evidence: Evidence) -> tuple[str, str]:
    """(state, why) of a stage without a valid manifest."""
    return next(rule for rule in RULES if rule.holds(evidence)).conclude(evidence)
