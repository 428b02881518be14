"""The jobs of runs as Slurm tells them: one squeue for any number of runs, sacct for what squeue
has forgotten, and reasons in words.

A job belongs to a run by its name or comment, which carry the run's id: job ids are handed out
again after a controller crash.
"""

from __future__ import annotations

import os
import pwd
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from launcher.run.folder import Run
from launcher.slurm import commands

ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
    "REVOKED",
}
FIELDS = "%A|%F|%K|%T|%r|%E|%S|%N|%j|%k"
REASONS = {
    "None": "just queued",
    "Priority": "jobs of higher priority come first",
    "Resources": "the nodes it needs are busy",
    "Prolog": "Slurm prepares its nodes",
    "Cleaning": "Slurm cleans up after its last attempt",
    "JobHeldUser": "held by its owner; let it go: scontrol release {id}",
    "JobHeldAdmin": "held by the site's administrators; ask them",
    "JobHoldMaxRequeue": "held: it was requeued too often for this site; let it go: scontrol release {id}",
    "launch_failed_requeued_held": "held: Slurm could not start it on its nodes; let it go: scontrol release {id}",
    "BeginTime": "queued again; Slurm holds it back for a moment",
    "PartitionTimeLimit": "asks for more time than its partition gives: it will never start; lower "
    "resources.STAGE.minutes",
    "PartitionNodeLimit": "asks for more nodes than its partition gives: it will never start; lower "
    "resources.STAGE.nodes",
    "PartitionDown": "its partition is closed",
    "PartitionInactive": "its partition is closed",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "NodeDown": "nodes that it needs are down",
    "BadConstraints": "no node fits what it asks for: it will never start; see the profile's constraint",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation to begin",
    "ReservationDeleted": "its reservation was deleted: it will never start",
    "InvalidAccount": "its account is not valid any more: it will never start",
    "InvalidQOS": "its QOS is not valid any more: it will never start",
    "JobArrayTaskLimit": "its array runs only so many elements at once",
    "Dependency": "waits for {parents}",
    "DependencyNeverSatisfied": "its parent failed, so it will never start; queue it again: python -m launcher "
    "resume {run}",
}
FAMILIES = (
    ("QOS", "a limit of your QOS is reached ({reason}): it starts when other jobs of it end"),
    ("Assoc", "a limit of your account is reached ({reason}): it starts when other jobs of it end"),
    ("Max", "a limit of your account is reached ({reason}): it starts when other jobs of it end"),
    ("BurstBuffer", "its burst buffer is being staged ({reason})"),
)
ENDINGS = {
    "COMPLETED": "Slurm calls it completed, but it left no DONE.json",
    "FAILED": "it failed before it could say why",
    "TIMEOUT": "it reached its time limit before it could save",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node could not boot",
    "OUT_OF_MEMORY": "the node ran out of memory",
    "PREEMPTED": "it was preempted before it could save",
    "DEADLINE": "it missed its deadline",
    "CANCELLED": "it was cancelled",
}


@dataclass(frozen=True)
class Job:
    id: int
    state: str
    reason: str = ""
    dependency: str = ""
    starts: float | None = None
    """When it started, or may start by Slurm's estimate."""
    nodes: str = ""
    element: str = ""
    """``<array>_<index>`` of an array's element."""
    source: str = "squeue"

    @property
    def alive(self) -> bool:
        """Pending, running or ending; an ended job stays visible for MinJobAge."""
        return self.state not in ENDED

    @property
    def pending(self) -> bool:
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def handle(self) -> str:
        """What scancel and scontrol call it."""
        return self.element or str(self.id)

    @property
    def stuck(self) -> bool:
        """Whether a parent's failure keeps it from ever starting, also when that parent has
        succeeded since."""
        return self.pending and (self.reason == "DependencyNeverSatisfied" or "(failed)" in self.dependency)

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        return ENDINGS.get(self.state, f"Slurm says {self.state}")

    def waits(self, parents: str, run: str) -> str:
        """Why a pending job waits, in words; ``parents`` are the stages that it needs and that are
        not done."""
        if self.stuck:
            return REASONS["DependencyNeverSatisfied"].format(run=run)
        word = self.reason.partition(",")[0].strip()
        # Slurm 22.05 prints "launch failed requeued held"
        word = next((name for name in (word, word.replace(" ", "_")) if name in REASONS), word)
        text = REASONS.get(word) or next(
            (text for start, text in FAMILIES if word.startswith(start)), word or "Slurm gives no reason"
        )
        if word == "Dependency" and not parents:
            return f"its parents are done; Slurm has still to see it ({self.dependency})"
        explanation = text.format(id=self.handle, parents=parents, run=run, reason=self.reason)
        rest = self.reason.partition(",")[2].strip()
        return f"{explanation} ({rest})" if rest and word in REASONS else explanation


def of_run(run: Run) -> dict[str, Job]:
    """Stage -> its job, alive or recently ended, of one run. Raises SlurmError where the queue
    can't be asked."""
    return of_runs([run])[run.id]


def of_runs(runs: Iterable[Run], timeout_s: float = commands.TIMEOUT_S, ping: bool = True) -> dict[str, dict[str, Job]]:
    """Run id -> stage -> its job, by one squeue: all jobs of the runs' owners, of which ours are
    picked by name or comment.

    ``ping`` first: SlurmError comes at once where no controller answers.
    """
    if ping:
        commands.ping(timeout_s)
    named = {_name(run): run for run in runs}
    owners = ",".join(sorted({owner(run) for run in named.values()}))
    text = commands.call("squeue", "-h", "-t", "all", "-u", owners, "-o", FIELDS, timeout_s=timeout_s)
    return {run.id: parse(text, *name) for name, run in named.items()}


def parse(text: str, run_id: str, index: int | None = None) -> dict[str, Job]:
    """Stage -> job of one run in squeue's text; the live one, else the newest. ``index``: its
    element of a sweep's array."""
    jobs_found: dict[str, Job] = {}
    for line in text.splitlines():
        if run_id not in line:  # cheap: thousands of lines may be strangers
            continue
        number, array, indices, state, reason, dependency, start, nodes, name, comment = line.split("|", 9)
        match = re.fullmatch(rf"{re.escape(run_id)}\.(\w+)", name) or re.fullmatch(
            rf"convoy run={re.escape(run_id)} (?:submission=\w+ )?stage=(\w+)(?: .*)?", comment.strip()
        )
        if not match or (index is not None and not _contains(indices, index)):
            continue
        job = Job(
            int(number),
            state,
            reason,
            "" if dependency == "(null)" else dependency,
            _when(start),
            nodes,
            "" if index is None else f"{array}_{index}",
        )
        stage = match[1]
        if stage not in jobs_found or (job.alive, job.id) > (jobs_found[stage].alive, jobs_found[stage].id):
            jobs_found[stage] = job
    return jobs_found


MOST_NAMES = 500
"""Job names in one question to sacct: an argument of more than 128 KiB can't be passed."""


def accounted(stages_of: dict[Run, set[str]], timeout_s: float = commands.TIMEOUT_S) -> dict[str, dict[str, Job]]:
    """Run id -> stage -> its last job in the accounting; empty where there is none, it lags, or
    there is no sacct.

    No row is no news: a new job is unknown for up to a second, and any job for a while after
    slurmdbd was restarted.
    """
    # an element of a sweep is "<sweep>.<stage>" with its index behind the array's id
    names = {
        (f"{_name(run)[0]}.{stage}", _name(run)[1]): (run.id, stage)
        for run, stages in stages_of.items()
        for stage in stages
    }
    first = min((event["time"] for run in stages_of for event in run.ledger()[:1]), default=time.time())
    since = datetime.fromtimestamp(first - 86_400).strftime("%Y-%m-%d")
    owners, names_asked = ",".join(sorted({owner(run) for run in stages_of})), sorted({name for name, _ in names})
    last: dict[str, dict[str, Job]] = {run.id: {} for run in stages_of}
    try:
        texts = [
            commands.call(
                "sacct",
                "-n",
                "-P",
                "-X",
                "-S",
                since,
                "-u",
                owners,
                f"--name={','.join(names_asked[at : at + MOST_NAMES])}",
                "-o",
                "JobIDRaw,JobID,JobName,State,Start,NodeList",
                timeout_s=timeout_s,
            )
            for at in range(0, len(names_asked), MOST_NAMES)
        ]
    except commands.SlurmError:
        return last
    for line in "\n".join(texts).splitlines():
        number, shown, name, state, start, nodes = line.split("|", 5)
        array, element, index = shown.partition("_")
        key = (name, int(index) if element and index.isdigit() else None)
        if key in names and number.isdigit():
            run_id, stage = names[key]
            job = Job(
                int(number),
                state.split()[0],
                starts=_when(start),
                nodes=nodes,
                source="sacct",  # "CANCELLED by 0"
                element=shown if element else "",
            )
            if stage not in last[run_id] or job.id >= last[run_id][stage].id:
                last[run_id][stage] = job
    return last


def owner(run: Run) -> str:
    """Who made the run: a colleague may look at it."""
    uid = os.stat(run.config_file).st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _name(run: Run) -> tuple[str, int | None]:
    """What its jobs are named by: its id; for an element of a sweep the sweep's id and the
    element's index."""
    sweep = run.config["run"].get("sweep")
    return (sweep["id"], sweep["index"]) if sweep else (run.id, None)


def _contains(indices: str, index: int) -> bool:
    """Whether squeue's ``0-3,7%2`` names ``index``."""
    for part in indices.partition("%")[0].split(","):
        first, _, last = part.strip("[]").partition("-")
        if first.isdigit() and int(first) <= index <= int(last.partition(":")[0] or first):
            return True
    return False


def _when(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # N/A, Unknown
        return None
