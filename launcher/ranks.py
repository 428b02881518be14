"""Start a stage's ranks, merge what they print into one rank-tagged log, and say which rank ended first and why."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher import probe

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
GRACE_S = 2
"""Seconds that the other ranks get to say what they saw when one has died; then they are killed."""
SAVE_GRACE_S = 60
"""The same when the first one ended because all were to save."""
SAVED = 75
"""EX_TEMPFAIL: the stage saved its state and wants to go on."""
WRAPPER = 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec "$@"'
EXCEPTION = re.compile(r"^(\w[\w.]*(Error|Exception|Interrupt|Exit|Warning)\b.*|AssertionError.*)$")


@dataclass
class Ending:
    """How one attempt ended: ``code`` of the first rank that failed (negative: a signal's number), 0 when all ended well."""

    code: int
    rank: int | None = None
    line: str = ""
    """The exception of that rank, or the last thing it printed."""

    def cause(self) -> str:
        """One sentence with the rank, how it ended and its last word."""
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        if self.code == -signal.SIGKILL:
            how += " (kill -9, or the machine ran out of memory)"
        return f"{'a rank' if self.rank is None else f'rank {self.rank}'}: {how}{f': {self.line}' if self.line else ''}"


@dataclass
class Log:
    """The merged log of one attempt; lines are ``[rank] text``, those of srun ``[srun] text``."""

    path: Path
    last: dict = field(default_factory=lambda: collections.defaultdict(str))
    """Rank -> its last exception, or its last line while it has raised none."""
    raised: set = field(default_factory=set)
    before: dict = field(default_factory=lambda: collections.defaultdict(str))
    """Rank -> its last line: under a traceback's end, the statement that raised."""

    def __post_init__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by run_*
        self.writing = threading.Lock()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def write(self, tag: int | str, text: str) -> None:
        with self.writing:
            with contextlib.suppress(OSError):  # a full disk must neither stop the rank nor hide how it ended
                self.file.write(f"[{tag}] {text}\n")
            text = re.sub(r"^\[rank\d+\]: ?", "", text)  # torch's own tag on the traceback of an uncaught exception
            if EXCEPTION.match(text):
                self.raised.add(tag)
                self.last[tag] = text if ":" in text else f"{text} at `{self.before[tag]}`"
            elif text.strip() and tag not in self.raised:
                self.last[tag] = text.strip()
            if text.strip(" ^~"):
                self.before[tag] = text.strip()


class Ranks:
    """The processes of one attempt; ``wait()`` of a subclass returns the Ending."""

    def __init__(self, log: Log):
        self.log = log
        self.processes: list[subprocess.Popen] = []

    def pass_on(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


class LocalRanks(Ranks):
    """One process a rank on this machine."""

    def __init__(self, log: Log, command: list[str], ranks: int, environment: dict[str, str]):
        super().__init__(log)
        self.ended: list[tuple[int, int]] = []  # (rank, code) in the order of their ends
        cores = len(os.sched_getaffinity(0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
                  "OMP_NUM_THREADS": str(max(1, cores // ranks)), **environment}
        for rank in range(ranks):
            self.processes.append(subprocess.Popen(
                command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace", preexec_fn=die_with_parent))
        self.readers = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in range(ranks)]
        for reader in self.readers:
            reader.start()

    def _read(self, rank: int) -> None:
        process = self.processes[rank]
        for line in process.stdout:
            self.log.write(rank, line.rstrip("\n"))
        self.ended.append((rank, process.wait()))

    def wait(self) -> Ending:
        """Until all ranks have ended; when one fails the others get GRACE_S to end, then are killed."""
        deadline = None
        while any(process.poll() is None for process in self.processes):
            failed = [code for _, code in self.ended if code]
            if failed and deadline is None:
                # a rank that died leaves the others in a collective that may never return
                deadline = time.monotonic() + (SAVE_GRACE_S if failed[0] == SAVED else GRACE_S)
            if deadline and time.monotonic() > deadline:
                self.pass_on(signal.SIGKILL)
            time.sleep(0.02)
        for reader in self.readers:
            reader.join(GRACE_S)  # a helper process of a rank may hold the pipe open
        self.log.close()
        codes = [*self.ended, *((rank, process.returncode) for rank, process in enumerate(self.processes))]
        first = next(((rank, code) for rank, code in codes if code), None)
        return Ending(0) if first is None else Ending(first[1], first[0], self.log.last[first[0]])


class SlurmRanks(Ranks):
    """One srun task a rank, within this allocation."""

    def __init__(self, log: Log, command: list[str], nodes: int, ranks_per_node: int, environment: dict[str, str]):
        super().__init__(log)
        self.failed: Ending | None = None
        job = int(os.environ["SLURM_JOB_ID"])
        hosts = probe.call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
        if len(hosts) < nodes:
            raise probe.SlurmError(f"this allocation has {len(hosts)} node(s), the run's resources ask for {nodes}: "
                                   f"sbatch --nodes={nodes} --gpus-per-node={ranks_per_node} ...")
        shared = {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(20000 + job % 12000), **environment}  # below the kernel's ephemeral ports
        if "CUDA_VISIBLE_DEVICES" in environment:  # slurmd sets it anew for each task, after srun's environment
            command = ["env", f"CUDA_VISIBLE_DEVICES={environment['CUDA_VISIBLE_DEVICES']}", *command]
        srun = ["srun", "--kill-on-bad-exit=1", "--label", f"--nodes={nodes}", f"--ntasks={nodes * ranks_per_node}",
                f"--ntasks-per-node={ranks_per_node}", "bash", "-c", WRAPPER, "rank", *command]
        log.write("srun", shlex.join(srun))
        self.processes.append(subprocess.Popen(srun, env={**os.environ, **shared}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                               stdin=subprocess.DEVNULL, text=True, errors="replace"))

    def wait(self) -> Ending:
        process = self.processes[0]
        for line in process.stdout:
            self._line(line.rstrip("\n"))
        code = process.wait()
        self.log.close()
        if code == 0:
            return Ending(0)
        if self.failed is None:
            return Ending(code if code < 128 else 128 - code)
        self.failed.line = self.log.last[self.failed.rank] if self.failed.rank is not None else self.failed.line
        return self.failed

    def _line(self, line: str) -> None:
        labelled = re.match(r"^ *(\d+): (.*)$", line)
        if labelled:
            self.log.write(int(labelled[1]), labelled[2])
            return
        self.log.write("srun", line)
        ending = re.match(r"srun: error: \S+: tasks? (\d+)\S*: (?:Exited with exit code (\d+)|(\w[\w ]*))", line)
        if ending and self.failed is None:  # srun reports the ends in their order
            code = int(ending[2]) if ending[2] else -WORDS.get(ending[3].strip(), signal.SIGKILL)
            self.failed = Ending(code, int(ending[1]))


WORDS = {signal.strsignal(number): number for number in signal.valid_signals() if signal.strsignal(number)}
"""srun names signals in words: "Killed", "Terminated", "Segmentation fault"."""


def stage_command(module: str, config: Path) -> list[str]:
    return [sys.executable, "-u", "-m", module, str(config)]


def die_with_parent() -> None:
    """In the child, before exec: the kernel kills it when its parent dies, so that no rank writes on without a supervisor."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]
