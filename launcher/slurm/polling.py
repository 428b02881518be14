"""When Slurm is asked. The runs' own files are read each second; the controller is asked when
they tell something new, and else
twice a minute, then once."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator

from launcher.run.folder import Run
from launcher.slurm import commands, queue
from launcher.slurm.queue import Job

ASK_S, ACCOUNTING_S = 10, 4
"""Seconds that the queue, and the accounting, may take to answer; then the files tell alone."""
DELAYS_S = (3, 30, 60)
"""Seconds until the next question: after news, as a job takes a moment to begin and to end; then;
and from then on."""
SILENT_DELAYS_S = (10, 30, 60)
"""The same while Slurm does not answer."""

MANY = 25
"""Runs from which on news waits longer for a question."""

Jobs = dict[str, dict[str, Job]]
"""Run id -> stage -> its job."""


class Queue:
    """The jobs of some runs as Slurm told them last. One object a command: it remembers when it
    asked.

    ``clock`` gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self.trouble = clock, ""
        self.jobs: Jobs = {}
        self.next, self.asked_at, self.step = float("-inf"), float("-inf"), 0
        self.news: Hashable = None

    def of(self, runs: list[Run], news: Hashable, forgotten: Callable[[Jobs], dict[Run, set[str]]]) -> Jobs:
        """Run id -> stage -> job; where it isn't time to ask, what was told last.

        ``news`` differs from the last call's where the files tell something new.
        ``forgotten(jobs)`` names the stages that the accounting is to be asked for. ``trouble``
        then says why Slurm could not be asked, "" where it was.
        """
        if not runs:
            return {}
        if news != self.news:
            self.news, self.step = news, 0
            soon = DELAYS_S[0] * max(1.0, len(runs) / MANY)  # a large sweep always has news
            self.next = min(self.next, self.asked_at + min(soon, DELAYS_S[1]))
        if self.clock() >= self.next:
            self._ask(runs, forgotten)
        return self.jobs

    def _ask(self, runs: list[Run], forgotten: Callable[[Jobs], dict[Run, set[str]]]) -> None:
        first, silent = self.asked_at == float("-inf"), bool(self.trouble)
        before, self.asked_at = self.jobs, self.clock()
        try:
            # the cheap ping tells at once of a controller that is down, where squeue would try for
            # 10 s
            self.jobs, self.trouble = queue.of_runs(runs, ASK_S, ping=first or silent), ""
        except commands.SlurmError as error:
            self.jobs, self.trouble = {}, str(error)
        for run_id, rows in _accounted(forgotten(self.jobs)).items():
            self.jobs.setdefault(run_id, {}).update(rows)
        if bool(self.trouble) != silent:
            self.step = 0
        elif self.jobs != before:
            self.step = min(self.step, 1)
        delays = SILENT_DELAYS_S if self.trouble else DELAYS_S
        self.next = self.asked_at + delays[min(self.step, len(delays) - 1)]
        self.step += 1


def pauses(first_s: float, most_s: float) -> Iterator[float]:
    """Seconds between questions about something that is about to happen: each time twice as
    long."""
    while True:
        yield first_s
        first_s = min(2 * first_s, most_s)


def _accounted(stages_of: dict[Run, set[str]]) -> Jobs:
    return queue.accounted(stages_of, ACCOUNTING_S) if stages_of else {}
