"""What an evaluation that fails leaves for the launcher, as training/error_report.py does: class
and message."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from functools import partial
from pathlib import Path

import safetensors
import torch
import torch.distributed as dist
import transformers

from eval.errors import DataError, HarnessError, JudgeError, SurroundingsError

FOLDER = "CONVOY_WORDS"
"""Environment variable: where ``rank_R.json`` is left, {"class", "message"};
launcher/job/outcome.py names the classes."""
BAD_CONFIG, BAD_DATA, JUDGE, HARNESS, TOO_FEW_RATINGS = "bad config", "bad data", "judge", "harness", "too few ratings"
CODES = {BAD_CONFIG: 64, BAD_DATA: 65, "file error": 73, "disk full": 74, TOO_FEW_RATINGS: 4}
"""Class -> exit code; 1 for the others."""
OWN = ((DataError, BAD_DATA), (SurroundingsError, BAD_CONFIG), (JudgeError, JUDGE), (HarnessError, HARNESS))
KINDS = (*OWN, (torch.OutOfMemoryError, "cuda oom"), (MemoryError, "host oom"))
TORCH = (RuntimeError, getattr(torch, "AcceleratorError", RuntimeError))
NODE = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENODEV, errno.EREMOTEIO)
NUMBERS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "disk full"),
    errno.ENOMEM: "host oom",
    **dict.fromkeys(NODE, "node failure"),
}


def kind_of(error: BaseException) -> str:
    """The error's class; "" for a plain RuntimeError of torch's: the launcher knows its texts."""
    for kind, name in KINDS:
        if isinstance(error, kind):
            return name
    if isinstance(error, OSError):
        connection = isinstance(error, ConnectionError | TimeoutError) or error.errno is None
        return NUMBERS.get(error.errno) or ("bug" if connection else "file error")
    return "" if type(error) in TORCH or isinstance(error, dist.DistError) else "bug"


def write(kind: str, message: str) -> int:
    """Leave class and message for the launcher, whole or not at all; the exit code."""
    _leave(f"rank_{os.environ.get('RANK', '0')}.json", {"class": kind, "message": message})
    return CODES.get(kind, 1)


def versions() -> None:
    """Leave the versions of what computes, from this interpreter's packages; rank 0 does so."""
    if os.environ.get("RANK", "0") == "0":
        packages = {module.__name__: module.__version__ for module in (torch, transformers, safetensors)}
        _leave("versions.json", {"python": platform.python_version(), **packages})


def _leave(name: str, value: dict) -> None:
    if folder := os.environ.get(FOLDER):
        path = Path(folder) / name
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            # a message may hold a key, until the launcher has masked it
            private = partial(os.open, mode=0o600)
            with open(path.with_suffix(".new"), "w", encoding="utf-8", opener=private) as file:
                json.dump(value, file)
            path.with_suffix(".new").replace(path)


def of(error: BaseException) -> int:
    """Write what ``error`` says; the exit code."""
    own = isinstance(error, tuple(kind for kind, _ in OWN))
    return write(kind_of(error), str(error) if own else f"{type(error).__name__}: {error}")
