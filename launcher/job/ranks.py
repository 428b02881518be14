"""Start a stage's ranks, merge what they print into one rank-tagged log, and say in which order
they ended, and how."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launcher import run_module
from launcher.config import environment
from launcher.config.profile import Profile
from launcher.job.outcome import EXIT_SAVED, RankExit
from launcher.job.rank_log import Log
from launcher.slurm import commands, container

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
GRACE_S = 2
"""Seconds that the other ranks get to say what they saw when one has died; then they are killed."""
DRAIN_S = 60
"""Most seconds for reading what ended ranks have still written; GRACE_S without a line end it,
too."""
SAVE_GRACE_S = 60
"""The same when the first one ended because all were to save."""
PORTS = 50
"""Ports that are tried from a job's own on."""
WRAPPER = (
    # before the stage has its own handlers, a request to save must not kill it
    "trap '' USR1 USR2; export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID; exec \"$@\""
)


class Ranks:
    """The processes of one attempt; ``wait()`` says in which order those ended that did not exit
    0."""

    def __init__(self, log: Log):
        self.log = log
        self.processes: list[subprocess.Popen] = []
        self.readers: list[threading.Thread] = []

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def show_stacks(self) -> None:
        """Ask each rank where it is (ABRT: Python's faulthandler writes all threads' stacks); it
        ends."""
        self.send_signal(signal.SIGABRT)

    def start(self, command: list[str], environ: dict[str, str], **options) -> None:
        self.processes.append(
            subprocess.Popen(
                command,
                env=environment.direct(environ),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                **options,
            )
        )

    def read(self, function: Callable, *arguments) -> None:
        self.readers.append(threading.Thread(target=function, args=arguments, daemon=True))
        self.readers[-1].start()

    def wait(self, tick: Callable[[], None]) -> list[RankExit]:
        """Until all have ended; ``tick`` is called some ten times a second. Empty when all exited
        0."""
        while any(process.poll() is None for process in self.processes):
            self.kill_after_failure()
            tick()
            time.sleep(0.05)
        self.read_remaining_output()
        ended = self.exits_in_order()
        self.log.close()
        return ended

    def read_remaining_output(self) -> None:
        """Read what the ranks have left in their pipes; not to the end where a helper process of
        theirs holds one open."""
        began = time.monotonic()
        while any(reader.is_alive() for reader in self.readers):
            now = time.monotonic()
            if now - max(self.log.last_output_at, began) > GRACE_S or now - began > DRAIN_S:
                break
            time.sleep(0.01)

    def kill_after_failure(self) -> None:
        """End those that can't go on; nothing where Slurm does it."""

    def exits_in_order(self) -> list[RankExit]:
        raise NotImplementedError


class LocalRanks(Ranks):
    """One process a rank on this machine."""

    def __init__(self, log: Log, command: list[str], ranks: int, variables: dict[str, str]):
        super().__init__(log)
        self.ends: list[tuple[int, int]] = []  # (rank, code) in the order of their ends
        self.deadline: float | None = None
        self.port = reserved_port()
        cores = len(os.sched_getaffinity(0))
        shared = {
            **environment.outside(),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port.getsockname()[1]),
            "OMP_NUM_THREADS": str(max(1, cores // ranks)),
            **variables,
        }
        for rank in range(ranks):
            self.start(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, preexec_fn=as_rank)
        for rank in range(ranks):
            self.read(self._read, rank)

    def _read(self, rank: int) -> None:
        process = self.processes[rank]
        for line in process.stdout:
            self.log.write(rank, line.rstrip("\n"))
        self.ends.append((rank, process.wait()))

    def kill_after_failure(self) -> None:
        """When one has failed the others get GRACE_S to end, then are killed: they may be in a
        collective that never returns."""
        failed = [code for _, code in self.ends if code]
        if failed and self.deadline is None:
            self.deadline = time.monotonic() + (SAVE_GRACE_S if failed[0] == EXIT_SAVED else GRACE_S)
        if self.deadline and time.monotonic() > self.deadline:
            self.send_signal(signal.SIGKILL)

    def exits_in_order(self) -> list[RankExit]:
        self.port.close()
        seen = dict(self.ends)
        late = [(rank, process.returncode) for rank, process in enumerate(self.processes) if rank not in seen]
        return [self.log.rank_exit(rank, code) for rank, code in (*self.ends, *late) if code]


class SlurmRanks(Ranks):
    """One srun task a rank, on ``hosts`` of this allocation."""

    def __init__(
        self,
        log: Log,
        command: list[str],
        hosts: list[str],
        ranks_per_node: int,
        variables: dict[str, str],
        profile: Profile,
    ):
        super().__init__(log)
        self.ends: list[tuple[int | None, int]] = []
        command = container.inside(profile, command)
        # slurmd sets it again for each task, after srun's environment
        if "CUDA_VISIBLE_DEVICES" in variables:
            command = ["env", f"CUDA_VISIBLE_DEVICES={variables['CUDA_VISIBLE_DEVICES']}", *command]
        srun = [
            *step(hosts, ranks_per_node, "--kill-on-bad-exit=1", "--label"),
            *container.srun_options(profile, variables),
            "bash",
            "-c",
            WRAPPER,
            "rank",
            *command,
        ]
        log.write("launcher", shlex.join(srun))
        self.start(srun, {**container.for_step(profile), **container.passed_on(profile, variables)})
        self.read(self._read)

    def _read(self) -> None:
        for line in self.processes[0].stdout:
            self._line(line.rstrip("\n"))

    def _line(self, line: str) -> None:
        labelled = re.match(r"^ *(\d+): (.*)$", line)
        if labelled:
            self.log.write(int(labelled[1]), labelled[2])
            return
        self.log.write("srun", line)
        self.ends += ends(line)  # in their order

    def show_stacks(self) -> None:
        # srun itself would die of it
        # a controller that does not answer: they are killed without it
        with contextlib.suppress(commands.SlurmError):
            commands.call("scancel", "--signal=ABRT", commands.own_job(int(os.environ["SLURM_JOB_ID"])))

    def exits_in_order(self) -> list[RankExit]:
        code = self.processes[0].returncode
        if code == 0 and self.log.lost_node():
            # srun gives up the ranks of a node that Slurm calls down, and exits 0
            return [self.log.rank_exit(None, 1)]
        if code == 0:
            return []
        if self.ends:
            return [self.log.rank_exit(rank, code) for rank, code in self.ends]
        return [self.log.rank_exit(None, code if 0 <= code < 128 else 128 - code if code > 0 else code)]


def step(hosts: list[str], tasks: int, *options: str) -> list[str]:
    """srun for ``tasks`` tasks on each host of this allocation.

    It says what a site or a shell may have set otherwise: tasks get this environment
    (SBATCH_EXPORT=NONE would empty it), and none is killed some time after the first one's end
    (slurm.conf: WaitTime).
    """
    return [
        "srun",
        "--export=ALL",
        "--wait=0",
        *options,
        f"--nodes={len(hosts)}",
        f"--nodelist={','.join(hosts)}",
        f"--ntasks={len(hosts) * tasks}",
        f"--ntasks-per-node={tasks}",
    ]


SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals() if signal.strsignal(number)}
"""srun names signals in words: "Killed", "Terminated", "Segmentation fault"."""


def ends(line: str) -> list[tuple[int, int]]:
    """(rank, code) of the tasks of whose end a line of srun tells; a signal's number is
    negative."""
    match = re.match(r"srun: error: \S+: tasks? ([\d,\-]+)\S*: (?:Exited with exit code (\d+)|(\w[\w ]*))", line)
    if match is None:
        return []
    # "Out Of Memory" is a kill, too
    code = int(match[2]) if match[2] else -SIGNALS.get(match[3].strip(), signal.SIGKILL)
    return [(rank, code) for rank in _numbers(match[1])]


def _numbers(text: str) -> list[int]:
    """ "0-2,5" -> [0, 1, 2, 5]."""
    ranks_found = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        ranks_found += range(int(first), int(last or first) + 1)
    return ranks_found


def stage_command(module: str, config: Path) -> list[str]:
    return run_module.command(module, str(config), options=("-u",))


def die_with_parent() -> None:
    """In the child, before exec: the kernel kills it when its parent dies, so that no rank writes
    on without a supervisor."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def as_rank() -> None:
    """In the child, before exec: as WRAPPER does, and it dies with the supervisor."""
    die_with_parent()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def job_port(job: int, here: bool) -> int:
    """MASTER_PORT of a job: below the kernel's ephemeral ports, apart for jobs on one node.
    ``here``: rank 0 will run on this node, so that a port which a stranger holds can be stepped
    over."""
    first_port = 20000 + job % 12000
    for port in range(first_port, first_port + PORTS if here else first_port):
        with socket.socket() as probe_socket:
            probe_socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe_socket.bind(("", port))
                return port
            except OSError:
                continue
    return first_port


def reserved_port() -> socket.socket:
    """A socket bound to a free port of loopback. While it is open the kernel gives that port to
    no one who asks for any; a server that names it, as torch's rendezvous does, may still listen
    there."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
