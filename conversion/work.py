"""Writing a folder of large files: in parallel, with progress, restartable, and in place only when
it is complete.

Files are written beside the target. Each gets its name only when it is whole and on disk, together
with a record of what was written; a run that was killed is started again and goes on with the files
that are missing. The bytes do not depend on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import BinaryIO, NamedTuple

from training.errors import ConfigError
from training.files import atomic

Count = Callable[[int], None]
Writer = Callable[[BinaryIO, Count], object]
"""Writes one file from start to end, tells ``Count`` the bytes of weights as they go, returns what
is to be known of it (JSON)."""
RECORDS = ".records"
MADE_FROM = "conversion.json"
"""What a folder was made from: equal content means that an interrupted conversion may go on."""
THREADS = 8
EXTRA = 1.02
"""Disk space asked for beyond the tensors' own bytes: headers, small files."""


@contextlib.contextmanager
def folder(aside: Path, made_from: dict, size: int) -> Iterator[None]:
    """``aside`` ready to be written to: empty, or with what an interrupted run of the same
    conversion left.

    Raises ConfigError where another process writes it now, OSError where less than ``size`` bytes
    (less those there) are free.
    """
    aside.mkdir(parents=True, exist_ok=True)
    with open(aside.with_name(aside.name + ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{aside}: another conversion is writing it; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks
        text, mark = json.dumps(made_from, indent=1, sort_keys=True) + "\n", aside / MADE_FROM
        if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
            shutil.rmtree(aside)
            aside.mkdir()
            check_space(aside, size)
            mark.write_text(text, encoding="utf-8")
        else:
            there = sum(path.stat().st_size for path in aside.rglob("*") if path.is_file() and path.suffix != ".part")
            check_space(aside, size - there)
        yield
        Path(lock.name).unlink(missing_ok=True)


def check_space(where: Path, size: int) -> None:
    """Raises OSError (ENOSPC) where ``size`` bytes do not fit."""
    free, needed = shutil.disk_usage(where).free, int(size * EXTRA)
    if needed > free:
        text = f"{needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free; make room or write to another disk"
        raise OSError(errno.ENOSPC, text, str(where))


class Written(NamedTuple):
    """A file that is whole and on disk: what its writer returned, and its sha256."""

    record: object
    sha256: str


def write_files(
    aside: Path, files: dict[str, Writer], sizes: dict[str, int], title: str, hashed: bool = True
) -> dict[str, Written]:
    """Write those of ``files`` (name below ``aside`` -> writer) that are not there yet. ``sizes``:
    bytes of weights of each.

    Not ``hashed``: their sha256 is left empty.
    """
    (aside / RECORDS).mkdir(exist_ok=True)
    left = {name: writer for name, writer in files.items() if not _done(aside, name)}
    progress = Progress(title, sum(sizes.values()), sum(sizes[name] for name in files.keys() - left.keys()))
    stop = threading.Event()

    def count(size: int) -> None:
        if stop.is_set():
            raise InterruptedError("another file could not be written")
        progress.add(size)

    # two on one core: one computes while the other waits for the disk
    threads = min(THREADS, max(2, len(os.sched_getaffinity(0))))
    with ThreadPoolExecutor(threads) as pool, progress:
        jobs = [pool.submit(_write, aside, name, writer, count, hashed) for name, writer in left.items()]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            failed = next((job for job in done if job.exception()), None)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        if failed:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise failed.exception()
    notes = {name: json.loads(_record(aside, name).read_text(encoding="utf-8")) for name in files}
    return {name: Written(note["record"], note["sha256"]) for name, note in notes.items()}


def clean(aside: Path) -> None:
    """Remove what only a restart needs."""
    shutil.rmtree(aside / RECORDS)


def replace(aside: Path, target: Path) -> None:
    """Make the complete folder ``aside`` the folder ``target``, durably; an old one goes after the
    new one is in place."""
    for path in [*(path for path in aside.rglob("*") if path.is_file()), aside]:
        atomic.sync(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    aside.replace(target)
    atomic.sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _record(aside: Path, name: str) -> Path:
    return aside / RECORDS / f"{name.replace('/', '!')}.json"


def _done(aside: Path, name: str) -> bool:
    path, record = aside / name, _record(aside, name)
    return (
        path.is_file()
        and record.is_file()
        and json.loads(record.read_text(encoding="utf-8"))["size"] == path.stat().st_size
    )


def _write(aside: Path, name: str, writer: Writer, count: Count, hashed: bool) -> None:
    path = aside / name
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        hashing = _Hashing(file)
        record = writer(hashing if hashed else file, count)
        file.flush()
        os.fsync(file.fileno())
    note = _record(aside, name)
    text = json.dumps(
        {"size": part.stat().st_size, "sha256": hashing.digest.hexdigest() if hashed else "", "record": record}
    )
    atomic.write_text(note, text)
    part.replace(path)


class _Hashing:
    """A file that is written from start to end, and the sha256 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()
        self.name, self.tell, self.flush = file.name, file.tell, file.flush

    def write(self, block) -> int:
        self.digest.update(block)
        return self.file.write(block)


class Progress:
    """Bytes written, bytes a second and time left: a line that is rewritten on a terminal, else a
    line every ten seconds."""

    def __init__(self, title: str, total: int, done: int):
        self.title, self.total, self.done, self.before = title, total, done, done
        self.started, self.lock, self.ended = time.monotonic(), threading.Lock(), threading.Event()
        self.live = sys.stderr.isatty()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def add(self, size: int) -> None:
        with self.lock:
            self.done += size

    def text(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        speed = (self.done - self.before) / seconds
        share = self.done / max(self.total, 1)
        bar = ("━" * round(24 * share)).ljust(24, "─")
        left = f"{(self.total - self.done) / speed:.0f} s left" if speed else "starting"
        resumed = f", {self.before / 1e9:.2f} GB were there" if self.before else ""
        amounts = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB  {speed / 1e6:.0f} MB/s"
        return f"{self.title} {bar} {100 * share:3.0f}%  {amounts}  {left}{resumed}"

    def _run(self) -> None:
        while not self.ended.wait(0.2 if self.live else 10):
            self._show()

    def _show(self) -> None:
        print(
            f"\r\033[K{self.text()}" if self.live else self.text(),
            end="" if self.live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self._show()
        if self.live:
            print(file=sys.stderr, flush=True)


def described(paths: list[Path]) -> list:
    """Files by name, size and time: whether they are the same as when a conversion began."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
