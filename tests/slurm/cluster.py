"""A real Slurm cluster of a test's own, started by slurm/dev/up as a user would, in a folder that
is removed at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from tests.support.stub_project import ROOT, wait_until

PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing(*programs: str) -> list[str]:
    return [program for program in programs if shutil.which(program, path=PATH) is None]


class Cluster:
    """``with Cluster(NODES=1) as cluster``: options are those of slurm/dev/up, without
    CONVOY_DEV_."""

    def __init__(self, **options):
        self.folder = Path(tempfile.mkdtemp(prefix="convoy-"))
        asked = {"KILL_WAIT": 3, **options}
        self.options = {
            "CONVOY_DEV": str(self.folder),
            **{f"CONVOY_DEV_{name}": str(value) for name, value in asked.items()},
        }

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:  # noqa: BLE001 - an interrupt too must not leave daemons behind
            self.__exit__()
            raise
        return self

    def __exit__(self, *_ended) -> None:
        subprocess.run(
            [ROOT / "slurm/dev/down", "--wipe"],
            env={**os.environ, **self.options},
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start what does not run; again after a daemon was killed."""
        # not a pipe: a daemon that kept it open would hang the test
        with open(self.folder / "up.out", "w+") as out:
            started = subprocess.run(
                [ROOT / "slurm/dev/up"],
                env={**os.environ, **self.options},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=120,
            )
            out.seek(0)
            said = out.read()
        assert started.returncode == 0, said
        self.environment = {"SLURM_CONF": re.search(r"^export SLURM_CONF=(.*)$", said, re.MULTILINE)[1]}

    def call(self, *command: str) -> str:
        """Standard output of a Slurm command on this cluster."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def pid(self, daemon: str) -> int:
        return int((self.folder / "run" / f"{daemon}.pid").read_text())

    def kill(self, daemon: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a daemon and wait until it has ended (SIGSTOP and SIGCONT: not)."""
        pid = self.pid(daemon)
        os.kill(pid, number)
        if number not in (signal.SIGSTOP, signal.SIGCONT):
            wait_until(lambda: not _runs(pid), 15, f"end of {daemon}")


def _runs(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
