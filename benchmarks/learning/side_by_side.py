"""Run commands that depend on one another, several at a time, each on its own GPU or on a share of
one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.job.ranks import die_with_parent

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals of a person, a batch system and a terminal that is closed."""
TIMEOUT_GRACE_S = 5
"""Seconds between TERM and KILL for commands that still run when the queue's time is over. The
caller has set that time."""
SIGNAL_GRACE_S = 60
"""Seconds between TERM and KILL after a signal. A stage saves at the end of its step and ends. A
stage that needs longer loses what it did since its last checkpoint; the next start continues from
there."""


class Unfinished(RuntimeError):
    """Raised by a command of a work that misses its input: the work has failed for that reason."""


@dataclass(frozen=True)
class Work:
    """Commands, one after the other. A command starts only when the one before has succeeded."""

    name: str
    commands: tuple[Sequence[str] | Callable[[], Sequence[str] | None], ...]
    """Each is a program's command, or a function that returns one or None. The function takes no
    time and may raise Unfinished."""
    after: tuple[str, ...] = ()
    """Names of the works that must have succeeded before."""
    until: float = math.inf
    """Seconds after the queue's start at which the first command gets SIGTERM. This is no failure:
    the second command starts, and decides whether there is enough to continue. A work that would
    start later starts with the second command."""
    load: int = 1
    """Its share of a GPU relative to the other works."""


def gpus() -> list[str]:
    """Ids of the GPUs that this process may use; empty on a machine without GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [number for number in visible.split(",") if number.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


@contextlib.contextmanager
def handling_signals(handle: Callable[[int], object]) -> Iterator[None]:
    """Call ``handle(number)`` for each of SIGNALS, except those that this process was started to
    ignore (nohup)."""
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: handle(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Queue:
    """``run`` does all of ``works``: one at each place, earlier ones first, on the GPU with the
    smallest load.

    Its programs don't outlive it. One of SIGNALS ends them with TERM, and with KILL after
    SIGNAL_GRACE_S or a second signal. The kernel kills them when this process is killed; a stage
    then loses what it did since its last checkpoint.
    """

    def __init__(self, works: Sequence[Work], places: Sequence[str], logs: Path, seconds: float = math.inf):
        """``places``: the GPU of each place, "" for none. ``seconds``: the queue's time; after it
        nothing starts and all that runs is ended. ``logs``: the folder of NAME.log, and of
        works.jsonl: {"name", "seconds", "done"} of each work that ended."""
        self.works, self.places, self.logs = list(works), list(places), logs
        self.began, self.seconds = time.monotonic(), seconds
        self.free = list(range(len(places)))
        self.terminated: set[str] = set()
        """Works whose first command got SIGTERM at ``Work.until`` and has not ended yet."""
        self.signals: list[int] = []
        """The signals that came, in their order."""
        self.started: dict[str, float] = {}
        self.running: dict[str, tuple[int, int, subprocess.Popen]] = {}
        """Name -> (place, number of the command, process)."""
        self.ended: dict[str, bool] = {}
        """Name -> whether it succeeded."""

    @property
    def remaining_s(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def run(self) -> dict[str, bool]:
        """Name -> whether it succeeded, of each work that started. Raises SystemExit(128 + number)
        after one of SIGNALS. Only the main thread may call it: other threads can't handle
        signals."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # no exception: it could come between the start of a program and its entry in self.running
        with handling_signals(self.signals.append):
            try:
                self._run_until_done()
            finally:
                name = signal.Signals(self.signals[0]).name if self.signals else ""
                self._end_all(
                    name or ("no time is left" if self.remaining_s <= 0 else "the queue has failed"),
                    SIGNAL_GRACE_S if name else TIMEOUT_GRACE_S,
                )
        if self.signals:
            self._print(f"{name}: what ran is ended, the rest is not begun; the same command goes on")
            raise SystemExit(128 + self.signals[0])
        for work in self.works:
            if work.name not in self.ended:
                missing = [name for name in work.after if not self.ended.get(name)]
                self._print(
                    f"{work.name}: not begun, {' and '.join(missing)} missing" if missing else f"{work.name}: not begun"
                )
        return self.ended

    def _run_until_done(self) -> None:
        """Run works until nothing runs and nothing can start, the time is over, or a signal has
        come."""
        while self.remaining_s > 0 and not self.signals:
            self._start_ready()
            if not self.running:
                break
            time.sleep(0.1)
            for name, (place, number, process) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    succeeded = process.returncode == 0 or name in self.terminated
                    self.terminated.discard(name)
                    self._start_command(self._work(name), place, number + 1 if succeeded else -1)
                elif number == 0 and name not in self.terminated and self._is_late(self._work(name)):
                    self._print(f"{name}: told to end")
                    self.terminated.add(name)
                    process.terminate()

    def _end_all(self, why: str, grace: float) -> None:
        """Send TERM to all commands, and KILL to those that run after ``grace`` seconds, or at once
        where a second signal comes."""
        for name, (_, _, process) in self.running.items():
            self._print(f"{name}: {why}")
            os.killpg(process.pid, signal.SIGTERM)  # a stage saves first
        end = time.monotonic() + grace
        while (
            time.monotonic() < end
            and len(self.signals) < 2
            and any(process.poll() is None for _, _, process in self.running.values())
        ):
            time.sleep(0.05)
        for name, (_, _, process) in self.running.items():
            # also what a program that has ended left behind in its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._end(name, False)
        self.running.clear()

    def _start_ready(self) -> None:
        for work in self.works:
            if (
                self.free
                and work.name not in self.running
                and work.name not in self.ended
                and all(self.ended.get(name) for name in work.after)
            ):
                place = min(self.free, key=lambda place: self._load(self.places[place]))
                self.free.remove(place)
                self.started[work.name] = time.monotonic()
                self._start_command(work, place, int(self._is_late(work)))

    def _is_late(self, work: Work) -> bool:
        return time.monotonic() - self.began > work.until

    def _load(self, gpu: str) -> int:
        return sum(self._work(name).load for name, (place, _, _) in self.running.items() if self.places[place] == gpu)

    def _end(self, name: str, done: bool) -> None:
        self.ended[name] = done
        row = {"name": name, "seconds": round(time.monotonic() - self.started[name], 1), "done": done}
        with open(self.logs / "works.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _start_command(self, work: Work, place: int, number: int) -> None:
        """Start the command ``number`` of ``work``, or end the work where there is none. -1: the
        command before failed."""
        command, why = None, f"see {self.logs / work.name}.log"
        try:
            while command is None and 0 <= number < len(work.commands):
                command = work.commands[number]
                if callable(command) and (command := command()) is None:
                    number += 1
        except Unfinished as error:
            command, number, why = None, -1, str(error)
        if command is not None:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.places[place]} if self.places[place] else {})
            with open(self.logs / f"{work.name}.log", "a", encoding="utf-8") as log:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
            self.running[work.name] = (place, number, process)
            self._print(f"{work.name}: {' '.join(map(str, command[1:4]))} (GPU {self.places[place] or '-'})")
            return
        self.free.append(place)
        self._print(f"{work.name}: {'done' if number >= 0 else f'failed, {why}'}")
        self._end(work.name, number >= 0)

    def _work(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)

    def _print(self, text: str) -> None:
        # the terminal may be closed: what runs must still be ended
        with contextlib.suppress(OSError):
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)
