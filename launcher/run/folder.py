"""The run folder: merged config, append-only ledger, status of each stage. Every write is atomic or
fsynced."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Collection
from pathlib import Path

from launcher.config.sections import Profile
from launcher.config.stages import PIPELINES, PPO, Graph, Stage, sections
from launcher.run import records
from training.config.schema import build
from training.errors import ConfigError
from training.files.safe_files import Unfit, read_bytes, read_json, read_table, read_text

SUMMARY = "summary.json"
"""In a run's folder data: what was dropped and cut of its rows."""
SWEEP = "sweep.json"
"""In the folder of a sweep; its runs are the folders 0, 1, ... there."""


class Failed(RuntimeError):
    """Something outside the user's command line went wrong; the message says what and where to
    look."""


class Busy(RuntimeError):
    """Another process holds the lock."""


def write_json(path: Path, value) -> None:
    """Write aside, fsync, rename: a reader sees the old text or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # a link of this name would have another file written
    with open(
        os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666),
        "w",
        encoding="utf-8",
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def hash_of(value) -> str:
    """sha256 of the value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock says on a file system without locks: Lustre mounted without -o flock, NFS without its
lock service."""
LEDGER_S = 10
"""Seconds that a line of the ledger waits for another host's; then it is written all the same."""


@contextlib.contextmanager
def lock(path: Path):
    """Hold ``path`` exclusively; the kernel lets go when this process dies. Raises Busy where
    another process holds it, and
    ConfigError on a file system that has no locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "r+b"
    ) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"{path} is held by another process") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise ConfigError(
                f"{path}: its file system has no locks (flock: {error.strerror}), and without them two commands could "
                "start one stage twice; keep runs on another one (--runs FOLDER), or ask the site to mount it with "
                "locks (Lustre: -o flock; NFS: its lock service). python -m launcher doctor --node tests a folder"
            ) from None
        yield


def wait_for_lock(descriptor: int, seconds: float) -> None:
    """Take the lock of an open file, or go on without it after ``seconds``, or where there are no
    locks."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return


def process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (field 22 of /proc/PID/stat); None when it
    has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def this_process() -> dict:
    """What identifies this process later: a pid alone is reused."""
    return {"pid": os.getpid(), "pid_start": process_start(os.getpid()), "host": socket.gethostname()}


def is_alive(record: dict) -> bool:
    """Whether the process of ``this_process()`` still runs; one on another host is taken to run."""
    return record["host"] != socket.gethostname() or process_start(record["pid"]) == record["pid_start"] is not None


class Run:
    """One folder runs/<name>/."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def open(cls, folder: Path) -> Run:
        """An existing run; ConfigError names those that there are where it is none."""
        run = cls(folder)
        if not run.config_file.is_file():
            present = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
            there = f"; in {folder.parent} there are: {', '.join(present)}" if present else ""
            raise ConfigError(f"{folder} is not a run (no config.json){there}")
        return run

    def check_here(self) -> None:
        """ConfigError unless the paths in this run's files, relative to where it was submitted,
        mean the same from here."""
        written = Path(self.config["run"].get("folder", self.folder))
        if written.resolve() != self.folder.resolve():
            raise ConfigError(
                f"the files of this run name it {written}, which from {Path.cwd()} is another folder: "
                f"run the command from the directory in which {written} is {self.folder.resolve()}"
            )

    @property
    def pipeline(self) -> str:
        """Name of the run's graph; runs made before there were others have PPO's."""
        return self.config["run"].get("pipeline", PPO)

    @property
    def stages(self) -> Graph:
        return PIPELINES[self.pipeline]

    def stage_named(self, name: str) -> Stage:
        """ConfigError where the run's pipeline has no such stage."""
        if name not in self.stages:
            raise ConfigError(
                f"{self.folder} has no stage {name}: its pipeline is {self.pipeline} ({' -> '.join(self.stages)})"
            )
        return self.stages[name]

    def selected(self) -> list[Stage]:
        """The stages that the run was last submitted for, in order, and those that they need; all
        of a run that does not say."""
        selected = self.config["run"].get("selected") or []
        needed = {name for name in self.stages if name in selected} or set(self.stages)
        for name in reversed(self.stages):
            needed |= set(self.stages[name].parents) if name in needed else set()
        return [stage for name, stage in self.stages.items() if name in needed]

    @property
    def config_file(self) -> Path:
        return self.folder / "config.json"

    @property
    def config(self) -> dict:
        """config.json; ConfigError where it is torn, damaged or another tool's."""
        try:
            values = read_table(self.config_file)
        except Unfit as error:
            values, why = {}, f" ({error})"
        else:
            why = ""
        if wrong := records.wrong_in_config(values, PIPELINES):
            raise ConfigError(
                f"{self.config_file} is not a run's configuration: it is torn, or another "
                f"tool's{why or f' ({wrong})'}; name a run's folder, or start the run again"
            )
        return values

    @property
    def tables(self) -> dict[str, dict]:
        """The sections of config.json that this pipeline reads; ConfigError where one is missing or
        no table."""
        values = self.config
        for section in sections(self.stages):
            if not isinstance(values.get(section), dict):
                raise ConfigError(
                    f"{self.config_file} has no table {section}: it is damaged, or of another tool; start the run again"
                )
        return {section: values[section] for section in sections(self.stages)}

    @property
    def profile(self) -> Profile:
        """The site's profile as the run was submitted with it; ConfigError where config.json is
        damaged."""
        return build(Profile, self.config["profile"], f"{self.config_file}: profile")

    @property
    def id(self) -> str:
        return self.config["run"]["id"]

    def stage(self, name: str) -> Path:
        return self.folder / name

    def lock(self):
        """Held by whoever starts stages: the local runner as long as it runs, a Slurm submission
        while it queues."""
        return lock(self.folder / ".lock")

    def record(self, event: str, **fields) -> None:
        """Append one line to the ledger and wait until it is on disk."""
        line = json.dumps({"time": time.time(), "event": event, **fields}) + "\n"
        descriptor = os.open(self.folder / "ledger.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            wait_for_lock(descriptor, LEDGER_S)  # O_APPEND is not atomic between two NFS clients
            size = os.fstat(descriptor).st_size
            # a crash in the middle of the line before
            torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, b"\n" * bool(torn) + line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def ledger(self) -> list[dict]:
        """All events in order; a half-written or damaged line (a full disk, a crash) is left
        out."""
        try:
            return records.events(read_bytes(self.folder / "ledger.jsonl").decode(errors="replace"))
        except FileNotFoundError:
            return []

    def status(self, stage: str) -> dict:
        """status.json of a stage; one that never ran is {"state": "pending", "attempt": 0}, one
        whose file is damaged has failed."""
        path = self.stage(stage) / "status.json"
        try:
            return records.status(read_json(path), path)
        except (FileNotFoundError, NotADirectoryError):
            return {"state": "pending", "attempt": 0}
        except Unfit as error:
            attempts = [event.get("attempt") or 0 for event in self.ledger() if event.get("stage") == stage]
            return {
                "state": "failed",
                "attempt": max(attempts, default=0),
                "job": None,
                "cause": f"{error}; the ledger and logs are kept",
            }

    def data_summary(self) -> dict:
        """{"stages": the lengths that rows are cut to, "lines": what is dropped and cut of them};
        {} where that isn't known."""
        try:
            table = read_table(self.folder / "data" / SUMMARY)
        except OSError:
            return {}
        return table if isinstance(table.get("stages"), dict) and records.texts(table.get("lines")) else {}

    def write_status(self, stage: str, **fields) -> None:
        """Replace some fields of a stage's status.json."""
        known = {**self.status(stage), "stage": stage, "run": self.id, "updated": time.time()}
        write_json(self.stage(stage) / "status.json", {**known, **fields})

    def iteration(self, stage: str) -> int | None:
        """Iteration of the stage's last complete checkpoint (its file ``latest``); None without
        one."""
        try:
            text = read_text(self.stage(stage) / "latest", 1 << 10).strip()
        except (FileNotFoundError, NotADirectoryError, Unfit):
            return None
        return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None

    def checkpoint_iterations(self, stage: str) -> list[int]:
        folders = (self.stage(stage) / "checkpoints").glob("iter_*")
        numbers = (folder.name[5:] for folder in folders)
        return sorted(int(number) for number in numbers if number.isascii() and number.isdigit() and len(number) < 16)

    def runner(self) -> dict | None:
        """The local runner that works on this run now: {"pid", "pid_start", "host", "stages"}; None
        when there is none."""
        events = [event for event in self.ledger() if event["event"] in ("runner", "runner ended", "taken over")]
        return events[-1] if events and events[-1]["event"] == "runner" and is_alive(events[-1]) else None

    def uses_slurm(self) -> bool:
        """Whether the queue may hold a job of this run: it is to run there, or ``resume
        --take-over`` did not declare all its jobs dead."""
        if self.config["profile"]["scheduler"] == "slurm":
            return True
        events, disowned = self.ledger(), self.disowned()
        return any(event["job"] not in disowned for event in events if event.get("job"))

    def disowned(self) -> set[int]:
        """Jobs that ``resume --take-over`` declared dead: should Slurm start one after all, it must
        not touch the run."""
        return {job for event in self.ledger() if event["event"] == "taken over" for job in event.get("jobs") or []}

    def cancelled_since(self, when: float, job: int) -> bool:
        """Whether ``cancel`` was told to stop this job after ``when``: it must not queue itself
        again."""
        return any(
            event["event"] == "cancelled" and event["time"] >= when and job in dict(event.get("jobs") or {}).values()
            for event in self.ledger()
        )

    def changed(self) -> float:
        """When something last happened to the run, seconds since 1970."""
        path = self.folder / "ledger.jsonl"
        return (path if path.exists() else self.config_file).stat().st_mtime

    def set_aside(self, path: Path) -> Path:
        """Rename to the first free name path.1, path.2, ...: nothing is deleted."""
        number = 1
        while (target := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        os.replace(path, target)
        return target


def iteration_folder(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def named(run: Path, below: Path) -> Run:
    """The run in a folder, or of that name below ``below``."""
    return Run.open(run if (run / "config.json").exists() or len(run.parts) > 1 else below / run)


def elements(folder: Path) -> list[Run]:
    """The runs of a sweep, by index (launcher/submit/sweep.py): those that there are, where its
    submission was killed half-way."""
    runs = [Run(folder / str(index)) for index in range(len(sweep_of(folder)["values"]))]
    return [run for run in runs if run.config_file.is_file()]


def sweep_of(folder: Path) -> dict:
    """{"id", "values"} of a sweep's folder; ConfigError where sweep.json is torn or damaged."""
    try:
        return records.sweep(read_table(folder / SWEEP), folder / SWEEP)
    except Unfit as error:
        raise ConfigError(
            f"{error}: this is no sweep's folder, or its sweep.json is damaged; the same submit writes it again"
        ) from None


class Runs(list):
    """Several runs; ``named``: whether a person named them."""

    named = False
    sweeps: tuple[Path, ...] = ()
    """Folders of sweeps among the named ones; the runs are then their elements."""
    strangers: tuple[str, ...] = ()
    """Why folders below the one of all runs are left out."""

    @classmethod
    def open(cls, paths: Collection[Path], below: Path) -> Runs:
        """The runs of ``paths`` (folders, or names below ``below``; a sweep's stands for its
        elements), without any all below ``below``, the last active one first; ConfigError where
        there is none."""
        if paths:
            folders = [
                path
                if any((path / name).exists() for name in ("config.json", SWEEP)) or len(path.parts) > 1
                else below / path
                for path in paths
            ]
            sweeps = tuple(folder for folder in folders if (folder / SWEEP).is_file())
            runs_found = cls(
                run for folder in folders for run in (elements(folder) if folder in sweeps else [Run.open(folder)])
            )
            runs_found.named, runs_found.sweeps = True, sweeps
            if not runs_found:
                raise ConfigError(
                    f"{', '.join(map(str, sweeps))}: none of its runs was "
                    "written; the same submit command as before writes them"
                )
            return runs_found
        known_runs, strangers = [], []
        for path in sorted([*below.glob("*/config.json"), *below.glob(f"*/{SWEEP}")]):
            try:
                runs = elements(path.parent) if path.name == SWEEP else [Run(path.parent)]
                known_runs += [(run.changed(), run) for run in runs if run.config]
            except (ConfigError, OSError) as error:
                strangers.append(f"{path.parent} is left out: {error}")
        if not known_runs:
            raise ConfigError(
                "\n".join(
                    [
                        *strangers,
                        f"no run in {below}; start one: python -m launcher "
                        "submit full-pipeline; or say where they are: --runs DIR",
                    ]
                )
            )
        runs_found = cls(run for _, run in sorted(known_runs, key=lambda pair: pair[0], reverse=True))
        runs_found.strangers = tuple(strangers)
        return runs_found
