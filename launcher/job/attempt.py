"""One attempt of a stage while its ranks run: when the supervisor tells them to save, to save and
end, or to end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from launcher.config.stages import Stage
from launcher.job import deadline, requeue
from launcher.job.deadline import Deadline
from launcher.job.outcome import EXIT_SAVED, EXIT_STOPPED, OutcomeKind, RankExit
from launcher.job.ranks import Ranks
from launcher.job.slurm_action import SlurmAction, derive_action
from launcher.run.folder import Run
from launcher.slurm import commands

REPEAT_S = 5
"""Seconds between repetitions of a request to save: ranks that still start do not hear it."""
CLOCK_S = 0.5
"""Seconds between two looks at the clock."""
FILES_S = 2
"""Seconds between two looks at files: a sweep's many jobs share a metadata server."""
LAST_S = 10
"""The supervisor kills ranks that have not saved this many seconds before the job's end: then there
is time to requeue."""
ACTION_TRIES = 5
"""Questions to Slurm for the reason of a TERM: the first may die of the same TERM."""
STACKS_S = 3
"""Seconds that hung ranks get to write their stacks."""


class Attempt:
    """The ranks of one attempt, why the supervisor told them to end, and what Slurm did to the
    job."""

    def __init__(
        self,
        run: Run,
        stage: Stage,
        job: int | None,
        stall_minutes: int,
        default_lead_s: float,
        log_line: Callable[[str], None],
    ):
        self.run, self.stage, self.job, self.log_line = run, stage, job, log_line
        self.stall_s, self.deadline = 60 * stall_minutes, Deadline(run, stage.name, job, default_lead_s)
        self.ranks: Ranks | None = None
        self.stop_reason: OutcomeKind | None = None
        self.slurm_action: SlurmAction | None = None
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.terminated = False
        """A TERM came whose reason is not known yet."""
        self.hung_minutes = 0
        self.killed_at_the_end = False
        self.last_signal = self.last_clock_check = self.last_file_check = self.last_save_request = float("-inf")
        self.iteration_before_save: list[int | None] = []
        """The last checkpoint when the file SAVE appeared; [] without the file."""
        self.last_progress = (None, time.monotonic())

    def wait(self, ranks: Ranks) -> list[RankExit]:
        self.ranks = ranks
        return ranks.wait(self.poll)

    def on_signal(self, number: int) -> None:
        """From a signal handler: USR1 is Slurm's warning before the limit, or a person's; TERM has
        several reasons."""
        if number == signal.SIGUSR1:
            self.stop_reason = self.stop_reason or OutcomeKind.TIME_LIMIT
        elif self.job:
            self.terminated = True
        else:
            self.stop_reason = OutcomeKind.CANCELLED
        self.last_signal = float("-inf")  # the next poll passes it on

    def poll(self) -> None:
        """Some ten times a second, between the reads of the ranks' output."""
        now = time.monotonic()
        if (self.stop_reason or self.terminated) and now - self.last_signal > REPEAT_S:
            self.last_signal = now
            # before the question to Slurm: a slow controller takes seconds of KillWait
            self.tell_ranks_to_end()
        if self.terminated and self.slurm_action is None:
            self.ask_slurm_action()
        if now - self.last_file_check > FILES_S:
            self.last_file_check = now
            self.check_stop_and_save_files()
            self.check_stall(now)
        if now - self.last_clock_check > CLOCK_S:
            self.last_clock_check = now
            self.check_deadline()

    def tell_ranks_to_end(self) -> None:
        """Trainers save at the end of their step and exit 75. Other stages exit at once: their work
        is on the disk."""
        if self.stage.resumable:
            # under Slurm slurmd has sent a TERM to the tasks, too; srun would kill them on a TERM
            cancelled = self.stop_reason is OutcomeKind.CANCELLED
            self.ranks.send_signal(signal.SIGTERM if cancelled else signal.SIGUSR1)
        elif self.stop_reason in (OutcomeKind.CANCELLED, OutcomeKind.STOPPED):
            self.ranks.send_signal(signal.SIGTERM)

    def check_stop_and_save_files(self) -> None:
        """The files STOP and SAVE in the run folder."""
        if not self.stop_reason and (self.run.folder / "STOP").exists():
            self.log_line("file STOP: the ranks are told to save and end")
            self.stop_reason, self.last_signal = OutcomeKind.STOPPED, float("-inf")
        save = self.run.folder / "SAVE"
        if not self.stage.trainer or not save.exists():
            self.iteration_before_save = []
            return
        # iterations, not the files' times: two machines' clocks differ
        iteration = self.run.iteration(self.stage.name)
        if self.iteration_before_save and iteration != self.iteration_before_save[0]:
            self.iteration_before_save = []
            with contextlib.suppress(FileNotFoundError):
                save.unlink()
            self.log_line(f"file SAVE: iteration {iteration} is saved")
        elif time.monotonic() - self.last_save_request > REPEAT_S or not self.iteration_before_save:
            self.iteration_before_save = self.iteration_before_save or [iteration]
            self.last_save_request = time.monotonic()
            self.log_line("file SAVE: the ranks are told to save and go on")
            self.ranks.send_signal(signal.SIGUSR2)

    def check_deadline(self) -> None:
        """Tell the ranks to save in time; kill ranks that have not saved when the job ends."""
        to_save = self.deadline.seconds_to_save()
        if to_save is None:
            return
        to_end = self.deadline.seconds_to_end()
        if to_save < 0 and not self.stop_reason and self.stage.resumable:
            self.log_line(
                f"{to_end:.0f} s before the end of job {self.job}: the ranks are told to save "
                f"(steps and saves so far need {self.deadline.lead_s:.0f} s)"
            )
            preempted = self.deadline.facts.preempted
            self.stop_reason = OutcomeKind.PREEMPTED if preempted else OutcomeKind.TIME_LIMIT
            self.last_signal = float("-inf")
        if to_end < LAST_S and not self.killed_at_the_end:
            self.log_line(f"{to_end:.0f} s before the end of job {self.job}: the ranks have not ended, they are killed")
            self.killed_at_the_end, self.stop_reason = True, self.stop_reason or OutcomeKind.TIME_LIMIT
            self.ranks.send_signal(signal.SIGKILL)

    def check_stall(self, now: float) -> None:
        """Kill ranks that gave no sign of life for too long, after they wrote their stacks."""
        folder = self.run.stage(self.stage.name)
        times = tuple(_mtime(folder / name) for name in ("metrics.jsonl", "latest"))
        if times != self.last_progress[0]:
            self.last_progress = (times, now)
        quiet_s = now - max(self.last_progress[1], self.ranks.log.last_output_at)
        if self.hung_minutes:
            if quiet_s > STACKS_S:
                self.ranks.send_signal(signal.SIGKILL)
        elif quiet_s > self.stall_s:
            self.hung_minutes = self.stall_s // 60
            self.log_line(f"nothing heard of any rank for {self.hung_minutes} minutes: hung")
            self.ranks.log.write(
                "launcher",
                f"no sign of life for {self.hung_minutes} minutes: the ranks write their stacks and are ended",
            )
            self.ranks.show_stacks()

    def settle_slurm_action(self, exits: list[RankExit]) -> None:
        """Ask Slurm once more after the last poll.

        Slurm may tell the tasks of a preemption before the supervisor. It tells the supervisor
        nothing where it has lost a node and queued the job again.
        """
        lost_node = self.ranks is not None and self.ranks.log.lost_node()
        stopped = all(rank.code in (EXIT_SAVED, -signal.SIGTERM, EXIT_STOPPED) for rank in exits)
        unexplained = self.terminated or (self.stop_reason is None and (stopped or lost_node))
        printed = derive_action(None, self.restarts, self.srun_lines()) if self.slurm_action is None else None
        must_ask = bool(printed) or (self.slurm_action is None and unexplained)
        self.slurm_action = self.slurm_action or printed
        for _ in range(ACTION_TRIES if self.terminated else 1):
            if not self.job or not must_ask or self.ask_slurm_action():
                return

    def srun_lines(self) -> list[str]:
        """The last lines of srun and slurmstepd."""
        return list(self.ranks.log.lines["srun"]) if self.ranks else []

    def ask_slurm_action(self) -> bool:
        """Ask Slurm what it did to the job; returns whether Slurm answered."""
        try:
            facts = deadline.ask(self.job)
        except commands.SlurmError:  # the question may have died of the same TERM; the next poll repeats it
            return False
        action = derive_action(facts, self.restarts, self.srun_lines(), self.terminated)
        self.slurm_action = action or self.slurm_action
        if self.slurm_action is None or not self.terminated:
            return True
        kind = self.slurm_action.kind.value
        self.log_line(f"SIGTERM: {kind}; the ranks are told to save")
        # Slurm kills all within KillWait: what is known now is written now
        state = requeue.expected_state(self.slurm_action)
        cause = f"{kind}: told to end (SIGTERM)"
        self.run.write_status(self.stage.name, state=state, cause=cause, **{"class": kind})
        return True


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
