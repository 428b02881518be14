"""What a stage that fails leaves for the launcher: the class of its error and a message, one file a
rank.

``$CONVOY_WORDS/rank_R.json`` is {"class", "message"}, whole or not there; launcher/job/outcome.py
names the classes. eval/error_report.py writes the same.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from training.errors import CollectiveError, ConfigError, Damaged, DataError
from training.files import atomic

FOLDER = "CONVOY_WORDS"
"""Environment variable: the folder. Without it nothing is written: a stage that was started by
hand."""
DISK_FULL, FILE_ERROR = "disk full", "file error"
CODES = {"bad config": 64, "bad data": 65, "refused": 65, FILE_ERROR: 73, DISK_FULL: 74, "health gate": 76}
"""Class -> exit code; 1 for the others."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NODE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENODEV, errno.EREMOTEIO)
"""A disk or a file server that fails this node."""
KINDS = (
    (ConfigError, "bad config"),
    (DataError, "bad data"),
    (Damaged, "refused"),
    (FloatingPointError, "nan"),
    (torch.OutOfMemoryError, "cuda oom"),
    (MemoryError, "host oom"),
)
TORCH = (RuntimeError, getattr(torch, "AcceleratorError", RuntimeError))


def kind_of(error: BaseException) -> str:
    """The error's class. "" for a plain RuntimeError: torch, NCCL and gloo say in its text alone
    what happened, and the launcher knows these texts. What nothing here knows is a "bug"."""
    for kind, name in KINDS:
        if isinstance(error, kind):
            return name
    if isinstance(error, OSError):
        return kind_of_os_error(error)
    return "" if type(error) in TORCH or isinstance(error, dist.DistError) else "bug"


def kind_of_os_error(error: OSError) -> str:
    """A full disk, a failing node, no memory, a file; a connection, which no stage should need, is
    a "bug"."""
    by_number = {**dict.fromkeys(FULL, DISK_FULL), **dict.fromkeys(NODE, "node failure"), errno.ENOMEM: "host oom"}
    connection = isinstance(error, ConnectionError | TimeoutError) or error.errno is None
    return by_number.get(error.errno) or ("bug" if connection else FILE_ERROR)


def write(kind: str, message: str) -> None:
    """Leave them for the launcher. A disk that is full even for this loses them: the exit code is
    left."""
    _leave(f"rank_{os.environ.get('RANK', '0')}.json", {"class": kind, "message": message})


def versions() -> None:
    """Leave the versions of what computes, from this interpreter's packages: the launcher's may be
    another, outside a container. Rank 0 does so."""
    if os.environ.get("RANK", "0") == "0":
        versions = {"python": platform.python_version()}
        for package in ("torch", "megatron-core", "safetensors", "convoy-rlhf"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        _leave("versions.json", versions)


def _leave(name: str, value: dict) -> None:
    if not (folder := os.environ.get(FOLDER)):
        return
    path = Path(folder) / name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # a message may hold a key, until the launcher has masked it
        atomic.write_text(path, json.dumps(value), mode=0o600)


def of(error: BaseException, kind: str | None = None) -> int:
    """Write what ``error`` says; the exit code. ``kind``: where the caller knows it."""
    kind = kind_of(error) if kind is None else kind
    own = isinstance(error, ConfigError | DataError | Damaged | CollectiveError) or kind == DISK_FULL
    write(kind, str(error) if own else f"{type(error).__name__}: {error}")
    return CODES.get(kind, 1)


def printed(error: BaseException, kind: str | None = None) -> int:
    """As ``of``, and the message as the last line that the rank prints."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return of(error, kind)
