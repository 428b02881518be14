"""When a job must save: the end that Slurm has set for it, less what a step and a save have taken
so far."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.run import progress
from launcher.run.folder import Run
from launcher.slurm import commands

MARGIN_S = 30
"""Seconds kept for ranks to leave and for the requeue."""
SAVE_FACTOR = 1.5
"""A save at the end may meet a busier file system than those before it."""
ROWS_BYTES = 1 << 18
"""Of the end of metrics.jsonl, so much tells how long a step and a save take."""
POLL_S = 30
"""Seconds between questions to Slurm: the end moves with ``scontrol update TimeLimit`` and with
preemption."""


@dataclass(frozen=True)
class JobFacts:
    """What ``scontrol show job`` says about this job now."""

    state: str
    reason: str
    end: float | None
    """When Slurm will end it, epoch seconds."""
    start: float | None
    restarts: int
    preempted: bool
    """It was told to make room and has its GraceTime."""


def ask(job: int) -> JobFacts:
    """Raises SlurmError where Slurm does not answer."""
    text = commands.call("env", "SLURM_TIME_FORMAT=%s", "scontrol", "show", "job", "-o", commands.own_job(job))
    values = dict(re.findall(r"(\w+)=(\S*)", text))
    return JobFacts(
        values["JobState"],
        values.get("Reason", ""),
        _epoch(values.get("EndTime")),
        _epoch(values.get("StartTime")),
        int(values.get("Restarts", 0)),
        _epoch(values.get("PreemptTime")) is not None,
    )


def _epoch(text: str | None) -> float | None:
    return float(text) if text and text.isdigit() else None


def save_lead_s(rows: Sequence[dict], starts: Sequence[float], default_s: float, limit_s: float) -> float:
    """Seconds before the end at which to ask for the save, from the stage's metrics ``rows``.

    The ranks save at the end of the step that they are in: the longest step so far (with its
    evaluation, and the save before it), then the longest save, with margin. ``starts``: when each
    attempt began; a step is not measured across two of them. What was not measured counts
    ``default_s``. At most half the limit: a job must also get somewhere.
    """
    steps = [
        after["time"] - before["time"]
        for before, after in itertools.pairwise(rows)
        if not any(before["time"] < start <= after["time"] for start in starts)
    ]
    saves = [row["save_s"] for row in rows if row.get("save_s")]
    if not steps or not saves:
        return min(default_s, limit_s / 4)
    return min(max(steps) + SAVE_FACTOR * max(saves) + MARGIN_S, limit_s / 2)


class Deadline:
    """The time at which this attempt must save; None without a job, or where Slurm does not say."""

    def __init__(self, run: Run, stage: str, job: int | None, default_s: float):
        self.run, self.stage, self.job, self.default_s = run, stage, job, default_s
        self.last_asked, self.facts = 0.0, None
        self.lead_s = default_s

    def seconds_to_save(self) -> float | None:
        """Seconds until the ranks must be told to save; negative when it is time."""
        if not self.job:
            return None
        if time.monotonic() - self.last_asked > POLL_S or not self.last_asked:
            self.refresh()
        if self.facts is None or self.facts.end is None:
            return None
        return self.facts.end - self.lead_s - time.time()

    def seconds_to_end(self) -> float | None:
        """Seconds until Slurm ends the job."""
        return None if self.facts is None or self.facts.end is None else self.facts.end - time.time()

    def refresh(self) -> None:
        self.last_asked = time.monotonic()
        try:
            self.facts = ask(self.job)
        except commands.SlurmError:
            return  # a controller that is down: the end as last heard of
        if self.facts.end and self.facts.start:
            starts = [
                event["time"]
                for event in self.run.ledger()
                if event["event"] == "started" and event["stage"] == self.stage
            ]
            self.lead_s = save_lead_s(
                progress.rows(self.run, self.stage, ROWS_BYTES),
                starts,
                self.default_s,
                self.facts.end - self.facts.start,
            )
