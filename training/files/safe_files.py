"""Names that stand in a file, and files that another program or person may have written: where they
may lie, of what kind, how large. Standard library only; the launcher and the conversion use it,
too."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

MOST = 64 << 20
"""Bytes of a file that is read whole, unless its reader says otherwise."""
DIGITS = 40
"""Of a whole number in a JSON file: none that we write has more."""
LONGEST = 1024
"""Characters of a name that stands in a file."""


class Unfit(OSError):  # noqa: N818 - what is wrong with the file
    """A name or a file that is not taken in; the message names it, and says what was expected."""


def within(folder: str | Path, name: object) -> Path:
    """``folder``/``name`` for a ``name`` that a file gave. Raises Unfit unless it is a relative
    path without "..", and the place that it leads to, links followed, is below ``folder``."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST or not name.isprintable():
        raise Unfit(f"{name!r:.80} is no name of a file below {folder}")
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise Unfit(f"{name!r} is not below {folder}: expected a relative path without '..'")
    try:
        inside = Path(folder, name).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError):  # links that lead round in a circle
        inside = False
    if not inside:
        raise Unfit(f"{Path(folder, name)} is a link that leads out of {folder}: put the file itself there")
    return Path(folder, name)


def open_regular(path: str | Path) -> int:
    """A descriptor to read a file by. Raises Unfit for a pipe, a device, a socket or a folder,
    which is neither waited for nor read; other OSErrors as ``os.open`` does."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise Unfit(f"{path} is not a file") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unfit(f"{path} is not a file")
    return handle


def read_bytes(path: str | Path, most: int = MOST) -> bytes:
    """Content of a regular file of at most ``most`` bytes. Raises Unfit for another, OSError where
    it can't be read."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Unfit(f"{path} has more than {most >> 20} MiB: it is none of ours")
    return content


def read_text(path: str | Path, most: int = MOST) -> str:
    """UTF-8 text of a regular file. Raises Unfit, or OSError where it can't be read."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit(f"{path}: not UTF-8 at byte {error.start}") from None


def read_tail(path: str | Path, most: int) -> tuple[bytes, bool]:
    """(the last ``most`` bytes of a regular file, whether that is all of it)."""
    with open(open_regular(path), "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - most)
        file.seek(start)
        return file.read(most), not start


def parse(text: str, source: object):
    """The value of a JSON text. Raises Unfit, naming ``source``, for what is none, for brackets too
    deep and for a whole number of more than DIGITS digits."""
    try:
        return json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise Unfit(f"{source} is not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{source} is not JSON that can be read ({error or 'brackets too deep'})") from None


def read_json(path: str | Path, most: int = MOST):
    """The value of a JSON file. Raises Unfit, or OSError where it can't be read."""
    return parse(read_text(path, most), path)


def read_table(path: str | Path, most: int = MOST) -> dict:
    """The object of a JSON file. Raises Unfit, or OSError where it can't be read."""
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise Unfit(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
