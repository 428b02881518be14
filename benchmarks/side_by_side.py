"""Commands that depend on one another, several at a time, each with a GPU of its own or a share of one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class Unfinished(RuntimeError):
    """What a command of a work says that finds what it needs missing: the work has failed, and why is said."""


@dataclass(frozen=True)
class Work:
    """Commands, one after the other; the next begins only when the one before has succeeded."""

    name: str
    commands: tuple[Sequence[str] | Callable[[], Sequence[str] | None], ...]
    """Of a program, or a function that takes no time and may give one; it may raise Unfinished."""
    after: tuple[str, ...] = ()
    """Names of what has to have succeeded before."""
    until: float = math.inf
    """Seconds after the queue's beginning at which the first command is told to end (SIGTERM), which is no failure: the next begins. It
    says whether there is enough to go on with. A work that would begin later begins with the second command."""
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


class Queue:
    """``run`` does all of ``works``, one at each place, earlier ones first, each on the GPU with the smallest load."""

    def __init__(self, works: Sequence[Work], places: Sequence[str], logs: Path, seconds: float = math.inf):
        """``places``: the GPU of each, "" for none. ``seconds``: after so many nothing new begins and what runs is ended. ``logs``: folder
        of NAME.log, and of works.jsonl: {"name", "seconds", "done"} of each work that ended."""
        self.works, self.places, self.logs, self.began, self.seconds = list(works), list(places), logs, time.monotonic(), seconds
        self.free, self.told = list(range(len(places))), set()
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
        """Name -> whether it succeeded; what never began is not there."""
        self.logs.mkdir(parents=True, exist_ok=True)
        while self.left > 0:
            self._begin()
            if not self.running:
                break
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
            self._end(name, False)
        for work in self.works:
            if work.name not in self.ended:
                missing = [name for name in work.after if not self.ended.get(name)]
                self._say(f"{work.name}: not begun, {' and '.join(missing)} missing" if missing else f"{work.name}: not begun")
        return self.ended

    def _begin(self) -> None:
        for work in self.works:
            if self.free and work.name not in self.running and work.name not in self.ended and \
                    all(self.ended.get(name) for name in work.after):
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
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                           stderr=subprocess.STDOUT, start_new_session=True)
            self.running[work.name] = (place, number, process)
            self._say(f"{work.name}: {' '.join(map(str, command[1:4]))} (GPU {self.places[place] or '-'})")
            return
        self.free.append(place)
        self._say(f"{work.name}: {'done' if number >= 0 else f'failed, {why}'}")
        self._end(work.name, number >= 0)

    def _named(self, name: str) -> Work:
        return next(work for work in self.works if work.name == name)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)
