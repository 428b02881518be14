"""One attempt of a stage while its ranks run: when they are told to save, to save and end, or to
end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from launcher.config.stages import Stage
from launcher.job import deadline
from launcher.job.deadline import Deadline
from launcher.job.endings import SAVED, Class, Ended
from launcher.job.ranks import Ranks
from launcher.job.slurm_action import Fate, fate_of
from launcher.run.folder import Run
from launcher.slurm import commands

REPEAT_S = 5
"""Seconds between repetitions of a request to save: ranks that are still starting do not hear
it."""
LOOK_S = 0.5
"""Seconds between looks at the clock."""
FILES_S = 2
"""Seconds between looks at files: a sweep's many jobs share a metadata server."""
LAST_S = 10
"""Seconds before the end of the job at which ranks that have not saved are killed, so that there is
time to queue again."""
FATE_TRIES = 5
"""Questions for the reason of a TERM: the first may die of the same TERM."""
STACKS_S = 3
"""Seconds that hung ranks get to write where they are."""


class Attempt:
    """The ranks of one attempt, and why they were told to end (``asked``) or what Slurm did to
    their job (``fate``)."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        job: int | None,
        stall_minutes: int,
        default_lead_s: float,
        say: Callable[[str], None],
    ):
        self.run, self.stage, self.job, self.say = run, stage, job, say
        self.stall_s, self.deadline = 60 * stall_minutes, Deadline(run, stage.name, job, default_lead_s)
        self.ranks: Ranks | None = None
        self.asked: Class | None = None
        self.fate: Fate | None = None
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.terminated = False
        """A TERM came whose reason is not known yet."""
        self.hung_minutes = 0
        self.killed_at_the_end = False
        self.repeated = self.looked = self.looked_at_files = self.asked_to_save = float("-inf")
        self.save_from: list[int | None] = []
        """The iteration that was saved last when the file SAVE was seen first; empty without the
        file."""
        self.moved = (None, time.monotonic())

    def wait(self, ranks: Ranks) -> list[Ended]:
        self.ranks = ranks
        return ranks.wait(self.tick)

    def signalled(self, number: int) -> None:
        """From a signal handler: USR1 is Slurm's warning before the limit, or a person's; TERM has
        several reasons."""
        if number == signal.SIGUSR1:
            self.asked = self.asked or Class.TIME_LIMIT
        elif self.job:
            self.terminated = True
        else:
            self.asked = Class.CANCELLED
        self.repeated = float("-inf")  # the next tick passes it on

    def tick(self) -> None:
        """Some ten times a second, between the reads of the ranks' output."""
        now = time.monotonic()
        if (self.asked or self.terminated) and now - self.repeated > REPEAT_S:
            self.repeated = now
            # before Slurm is asked why: a slow controller takes seconds of KillWait
            self.ask_to_end()
        if self.terminated and self.fate is None:
            self.find_fate()
        if now - self.looked_at_files > FILES_S:
            self.looked_at_files = now
            self.operator()
            self.watch_stall(now)
        if now - self.looked > LOOK_S:
            self.looked = now
            self.watch_end()

    def ask_to_end(self) -> None:
        """Trainers save at the end of their step and exit 75; other stages do at once, their work
        is on the disk."""
        if self.stage.resumable:
            # under Slurm slurmd has sent a TERM to the tasks, too, and srun would take one as an
            # order to kill them
            self.ranks.pass_on(signal.SIGTERM if self.asked is Class.CANCELLED else signal.SIGUSR1)
        elif self.asked in (Class.CANCELLED, Class.STOPPED):
            self.ranks.pass_on(signal.SIGTERM)

    def operator(self) -> None:
        """The files STOP and SAVE in the run folder."""
        if not self.asked and (self.run.folder / "STOP").exists():
            self.say("file STOP: the ranks are told to save and end")
            self.asked, self.repeated = Class.STOPPED, float("-inf")
        save = self.run.folder / "SAVE"
        if not self.stage.trainer or not save.exists():
            self.save_from = []
            return
        # not the files' times: two machines' clocks differ
        iteration = self.run.iteration(self.stage.name)
        if self.save_from and iteration != self.save_from[0]:
            self.save_from = []
            with contextlib.suppress(FileNotFoundError):
                save.unlink()
            self.say(f"file SAVE: iteration {iteration} is saved")
        elif time.monotonic() - self.asked_to_save > REPEAT_S or not self.save_from:
            self.save_from = self.save_from or [iteration]
            self.asked_to_save = time.monotonic()
            self.say("file SAVE: the ranks are told to save and go on")
            self.ranks.pass_on(signal.SIGUSR2)

    def watch_end(self) -> None:
        """Ask for the save in time; kill ranks that have not saved when the end has come."""
        remaining = self.deadline.remaining()
        if remaining is None:
            return
        if remaining < 0 and not self.asked and self.stage.resumable:
            self.say(
                f"{self.deadline.left():.0f} s before the end of job {self.job}: the ranks are told to save "
                f"(steps and saves so far need {self.deadline.lead_s:.0f} s)"
            )
            self.asked = Class.PREEMPTED if self.deadline.facts.preempted else Class.TIME_LIMIT
            self.repeated = float("-inf")
        if self.deadline.left() < LAST_S and not self.killed_at_the_end:
            self.say(
                f"{self.deadline.left():.0f} s before the end of job "
                f"{self.job}: the ranks have not ended, they are killed"
            )
            self.killed_at_the_end, self.asked = True, self.asked or Class.TIME_LIMIT
            self.ranks.pass_on(signal.SIGKILL)

    def watch_stall(self, now: float) -> None:
        """Kill ranks of which nothing has been heard for too long, after they said where they
        are."""
        folder = self.run.stage(self.stage.name)
        seen = tuple(_mtime(folder / name) for name in ("metrics.jsonl", "latest"))
        if seen != self.moved[0]:
            self.moved = (seen, now)
        quiet = now - max(self.moved[1], self.ranks.log.heard)
        if self.hung_minutes:
            if quiet > STACKS_S:
                self.ranks.pass_on(signal.SIGKILL)
        elif quiet > self.stall_s:
            self.hung_minutes = self.stall_s // 60
            self.say(f"nothing heard of any rank for {self.hung_minutes} minutes: hung")
            self.ranks.log.write(
                "launcher",
                f"no sign of life for {self.hung_minutes} minutes: the ranks say where they are and are ended",
            )
            self.ranks.show_stacks()

    def settle_fate(self, ended: list[Ended]) -> None:
        """Find it once there is no next tick. Slurm may tell the tasks of a preemption before the
        supervisor. It tells the supervisor nothing where it has lost a node and queued the job
        again."""
        lost = self.ranks is not None and self.ranks.log.lost_node()
        told = all(one.code in (SAVED, -signal.SIGTERM, 143) for one in ended)
        unknown = self.fate is None and (self.terminated or (self.asked is None and (told or lost)))
        text = None if self.fate else fate_of(None, self.restarts, self.printed())
        self.fate = self.fate or text
        for _ in range(FATE_TRIES if self.terminated else 1):
            if not self.job or not (unknown or text) or self.find_fate():
                return

    def printed(self) -> list[str]:
        """The last lines of srun and slurmstepd."""
        return list(self.ranks.log.lines["srun"]) if self.ranks else []

    def find_fate(self) -> bool:
        """Ask Slurm what it did to the job; returns whether it answered."""
        try:
            facts = deadline.ask(self.job)
        except commands.SlurmError:  # the question may have died of the same TERM; it is put again by the next tick
            return False
        self.fate = fate_of(facts, self.restarts, self.printed(), self.terminated) or self.fate
        if self.fate is None or not self.terminated:
            return True
        kind = self.fate.kind
        self.say(f"SIGTERM: {kind.value}; the ranks are told to save")
        # Slurm kills all within KillWait: what is known now is written now
        state = "cancelled" if kind is Class.CANCELLED else "requeued" if self.fate.requeued else "running"
        cause = f"{kind.value}: told to end (SIGTERM)"
        self.run.write_status(self.stage.name, state=state, cause=cause, **{"class": kind.value})
        return True


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
