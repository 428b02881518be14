"""Read files that another program or person may have written, and resolve names that a file gives.

A file must be regular and not too large, a name must stay below its folder. Standard library only:
the launcher and the conversion use it, too.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

MAX_BYTES = 64 << 20
"""Most bytes of a file that is read as a whole, unless the caller gives another limit."""
MAX_DIGITS = 40
"""Most digits of a whole number in a JSON file. Convoy writes no longer ones."""
MAX_NAME = 1024
"""Most characters of a name that a file gives."""


class Unfit(OSError):  # noqa: N818 - what is wrong with the file
    """A name or a file that is refused. The message names it and says what was expected."""


def within(folder: str | Path, name: object) -> Path:
    """``folder``/``name`` for a ``name`` that a file gives. Raises Unfit unless ``name`` is a
    relative path without ".." that, with all links resolved, stays below ``folder``."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
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
    """Open a regular file for reading -> its descriptor. Raises Unfit, without waiting, for a pipe,
    a device, a socket or a folder, and other OSErrors as ``os.open`` does."""
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


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """Content of a regular file of at most ``most`` bytes. Raises Unfit for any other file, OSError
    where it can't be read."""
    with open(open_regular(path), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Unfit(f"{path} has more than {most >> 20} MiB: it is none of ours")
    return content


def read_text(path: str | Path, most: int = MAX_BYTES) -> str:
    """UTF-8 text of a regular file. Raises Unfit, or OSError where it can't be read."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit(f"{path}: not UTF-8 at byte {error.start}") from None


def read_tail(path: str | Path, most: int) -> tuple[bytes, bool]:
    """(the last ``most`` bytes of a regular file, True if that is the whole file). Raises Unfit and
    OSError as ``open_regular`` does."""
    with open(open_regular(path), "rb") as file:
        start = max(0, os.fstat(file.fileno()).st_size - most)
        file.seek(start)
        return file.read(most), not start


def parse(text: str, source: object):
    """The value of a JSON text. Raises Unfit that names ``source`` for text that is not JSON, nests
    too deep, or has a whole number of more than MAX_DIGITS digits."""
    try:
        return json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise Unfit(f"{source} is not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{source} is not JSON that can be read ({error or 'brackets too deep'})") from None


def read_json(path: str | Path, most: int = MAX_BYTES):
    """The value of a JSON file. Raises Unfit, or OSError where it can't be read."""
    return parse(read_text(path, most), path)


def read_table(path: str | Path, most: int = MAX_BYTES) -> dict:
    """The object of a JSON file. Raises Unfit, or OSError where it can't be read."""
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise Unfit(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
