"""Commands that depend on one another, several at a time, each with a GPU of its own or a share of
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
"""What a person, a batch system and a terminal that is closed say."""
LATE_S = 5
"""Seconds between TERM and KILL for what still runs when the queue's time is over: the caller has
said how long all may take."""
ASKED_S = 60
"""The same after a signal. A stage saves at the end of its step and ends at once; of one that needs
longer for both what it did since its last checkpoint is lost, and the next start goes on from
there."""


class Unfinished(RuntimeError):
    """What a command of a work says that finds what it needs missing: the work has failed, and why
    is said."""


@dataclass(frozen=True)
class Work:
    """Commands, one after the other; the next begins only when the one before has succeeded."""

    name: str
    commands: tuple[Sequence[str] | Callable[[], Sequence[str] | None], ...]
    """Of a program, or a function that takes no time and may give one; it may raise Unfinished."""
    after: tuple[str, ...] = ()
    """Names of what has to have succeeded before."""
    until: float = math.inf
    """Seconds after the queue's beginning at which the first command is told to end (SIGTERM),
    which is no failure: the next begins. It says whether there is enough to go on with. A work that
    would begin later begins with the second command."""
    load: int = 1
    """How much it asks of its GPU, beside the others."""


def gpus() -> list[str]:
    """Ids of the GPUs that this process may use; none on a machine without."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is not None:
        return [number for number in seen.split(",") if number.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


@contextlib.contextmanager
def heeded(told: Callable[[int], object]) -> Iterator[None]:
    """``told(number)`` is called for each of SIGNALS, but for those that this process was started
    to ignore (nohup)."""
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, _: told(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Queue:
    """``run`` does all of ``works``, one at each place, earlier ones first, each on the GPU with
    the smallest load.

    Its programs don't outlive it: one of SIGNALS ends them as the end of its time does (TERM, KILL
    after ASKED_S or a second signal), and the kernel kills them when this process is killed. What a
    stage of the launcher did since its last checkpoint is lost then.
    """

    def __init__(self, works: Sequence[Work], places: Sequence[str], logs: Path, seconds: float = math.inf):
        """``places``: the GPU of each, "" for none. ``seconds``: after so many nothing new begins
        and what runs is ended. ``logs``: folder of NAME.log, and of works.jsonl: {"name",
        "seconds", "done"} of each work that ended."""
        self.works, self.places, self.logs, self.began, self.seconds = (
            list(works),
            list(places),
            logs,
            time.monotonic(),
            seconds,
        )
        self.free, self.told = list(range(len(places))), set()
        self.signals: list[int] = []
        """Those that came, in their order."""
        self.started: dict[str, float] = {}
        self.running: dict[str, tuple[int, int, subprocess.Popen]] = {}
        """Name -> (place, number of the command, process)."""
        self.ended: dict[str, bool] = {}
        """Name -> whether it succeeded."""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def run(self) -> dict[str, bool]:
        """Name -> whether it succeeded; what never began is not there. SystemExit(128 + its number)
        after one of SIGNALS. Only for the main thread: others can't heed signals."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # no exception: it could come between a program's start and its being noted
        with heeded(self.signals.append):
            try:
                self._until_the_end()
            finally:
                name = signal.Signals(self.signals[0]).name if self.signals else ""
                self._end_all(
                    name or ("no time is left" if self.left <= 0 else "the queue has failed"),
                    ASKED_S if name else LATE_S,
                )
        if self.signals:
            self._say(f"{name}: what ran is ended, the rest is not begun; the same command goes on")
            raise SystemExit(128 + self.signals[0])
        for work in self.works:
            if work.name not in self.ended:
                missing = [name for name in work.after if not self.ended.get(name)]
                self._say(
                    f"{work.name}: not begun, {' and '.join(missing)} missing" if missing else f"{work.name}: not begun"
                )
        return self.ended

    def _until_the_end(self) -> None:
        """Until nothing runs and nothing can begin, the time is over, or a signal has come."""
        while self.left > 0 and not self.signals:
            self._begin()
            if not self.running:
                break
            time.sleep(0.1)
            for name, (place, number, process) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    self._go_on(
                        self._named(name), place, number + 1 if process.returncode == 0 or name in self.told else -1
                    )
                    self.told.discard(name)
                elif number == 0 and name not in self.told and time.monotonic() - self.began > self._named(name).until:
                    self._say(f"{name}: told to end")
                    self.told.add(name)
                    process.terminate()

    def _end_all(self, why: str, grace: float) -> None:
        """Tell all that runs to end; kill what has not after ``grace`` seconds, or at once where a
        second signal comes."""
        for name, (_, _, process) in self.running.items():
            self._say(f"{name}: {why}")
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

    def _begin(self) -> None:
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
                self._go_on(work, place, int(time.monotonic() - self.began > work.until))

    def _load(self, gpu: str) -> int:
        return sum(self._named(name).load for name, (place, _, _) in self.running.items() if self.places[place] == gpu)

    def _end(self, name: str, done: bool) -> None:
        self.ended[name] = done
        row = {"name": name, "seconds": round(time.monotonic() - self.started[name], 1), "done": done}
        with open(self.logs / "works.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _go_on(self, work: Work, place: int, number: int) -> None:
        """The command ``number`` of ``work``; -1: the one before failed."""
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
            self._say(f"{work.name}: {' '.join(map(str, command[1:4]))} (GPU {self.places[place] or '-'})")
            return
        self.free.append(place)
        self._say(f"{work.name}: {'done' if number >= 0 else f'failed, {why}'}")
        self._end(work.name, number >= 0)

    def _named(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)

    def _say(self, text: str) -> None:
        # a terminal that was closed: what runs is ended all the same
        with contextlib.suppress(OSError):
            print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)
