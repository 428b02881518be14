"""Commands that depend on one another, several at a time, each with a GPU of its own or a share of one."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Work:
    """Commands, one after the other; the next begins only when the one before has succeeded."""

    name: str
    commands: tuple[Sequence[str] | Callable[[], Sequence[str] | None], ...]
    """Of a program, or a function that takes no time and may give one."""
    after: tuple[str, ...] = ()
    """Names of what has to have succeeded before."""
    until: float = math.inf
    """Seconds after the queue's beginning at which the first command is told to end (SIGTERM), which is no failure: the next begins."""


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


class Queue:
    """``run`` does all of ``works``, one at each place, earlier ones first."""

    def __init__(self, works: Sequence[Work], places: Sequence[str], logs: Path, seconds: float = math.inf):
        """``places``: the GPU of each, "" for none. ``seconds``: after so many nothing new begins and what runs is ended. ``logs``: folder
        of NAME.log."""
        self.works, self.places, self.logs, self.began, self.seconds = list(works), list(places), logs, time.monotonic(), seconds
        self.free, self.told = list(range(len(places))), set()
        self.running: dict[str, tuple[int, int, subprocess.Popen]] = {}
        """Name -> (place, number of the command, process)."""
        self.ended: dict[str, bool] = {}
        """Name -> whether it succeeded."""

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.seconds - (time.monotonic() - self.began)

    def run(self) -> dict[str, bool]:
        """Name -> whether it succeeded; what never began is not there."""
        self.logs.mkdir(parents=True, exist_ok=True)
        while self.left > 0:
            self._begin()
            if not self.running:
                return self.ended
            time.sleep(0.1)
            for name, (place, number, process) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    self._go_on(self._named(name), place, number + 1 if process.returncode == 0 or name in self.told else -1)
                    self.told.discard(name)
                elif number == 0 and name not in self.told and time.monotonic() - self.began > self._named(name).until:
                    self._say(f"{name}: told to end")
                    self.told.add(name)
                    process.terminate()
        for name, (_, _, process) in self.running.items():
            self._say(f"{name}: no time is left")
            os.killpg(process.pid, signal.SIGTERM)  # a stage saves first
        for name, (_, _, process) in self.running.items():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            self.ended[name] = False
        return self.ended

    def _begin(self) -> None:
        for work in self.works:
            if self.free and work.name not in self.running and work.name not in self.ended and \
                    all(self.ended.get(name) for name in work.after):
                self._go_on(work, self.free.pop(0), 0)

    def _go_on(self, work: Work, place: int, number: int) -> None:
        """The command ``number`` of ``work``; -1: the one before failed."""
        command = None
        while command is None and 0 <= number < len(work.commands):
            command = work.commands[number]
            if callable(command) and (command := command()) is None:
                number += 1
        if command is not None:
            environment = os.environ | ({"CUDA_VISIBLE_DEVICES": self.places[place]} if self.places[place] else {})
            with open(self.logs / f"{work.name}.log", "a", encoding="utf-8") as log:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=subprocess.STDOUT, start_new_session=True)
            self.running[work.name] = (place, number, process)
            self._say(f"{work.name}: {' '.join(map(str, command[1:4]))} (place {place})")
            return
        self.ended[work.name] = number >= 0
        self.free.append(place)
        self._say(f"{work.name}: {'done' if number >= 0 else f'failed, see {self.logs / work.name}.log'}")

    def _named(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)
