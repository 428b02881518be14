"""Files and texts that another program or person may have written: read within limits, shown
without what would steer a terminal. The evaluation's gate; the launcher's is
training/files/safe_files.py."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

TABLE, ROWS = 16 << 20, 256 << 20
"""Most bytes of a JSON file, and of one of JSON lines."""
DIGITS = 40
"""Of a whole number: none that we write has more."""
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def plain(text: object) -> str:
    """Text to print: control characters, escapes, marks that turn the direction of writing and half
    characters are replaced; tabs and line ends stay."""
    return _UNSEEN.sub("\ufffd", str(text))


def read(path: Path, most: int) -> str:
    """UTF-8 text of a regular file of at most ``most`` bytes, wrong bytes replaced. Raises as
    ``content`` does."""
    return content(path, most).decode("utf-8", errors="replace")


def content(path: str | Path, most: int) -> bytes:
    """A regular file of at most ``most`` bytes. Raises as ``open_regular`` does, and ValueError for
    a larger file."""
    with open(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return data


def open_regular(path: str | Path) -> int:
    """Descriptor of a regular file, open for reading. Raises OSError where it is absent, and
    ValueError for a pipe, a device or a folder, which is not waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("it is not a file")
    return handle


def parse(text: str):
    """The value of a JSON text whose strings are whole. Raises ValueError where there is none to
    read."""
    try:
        value = json.loads(text, parse_int=_whole_number)
        return _mended(value) if "\\ud" in text.lower() else value
    except RecursionError:
        raise ValueError("brackets too deep") from None


def table(path: Path, damaged: list[str] | None = None) -> dict:
    """The object in a file; {} where there is none, which is noted in ``damaged`` unless it is
    absent."""
    try:
        value = parse(read(path, TABLE))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        return value
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _note(damaged, f"{path} can't be read: {error}")
        return {}


def rows(
    path: Path, kinds: Mapping[str, Callable[[object], bool]] | None = None, damaged: list[str] | None = None
) -> list[dict]:
    """Objects of a JSON-lines file, those that have the fields of ``kinds``. Left out are also a
    last line that a kill tore, and damaged ones, whose number is noted in ``damaged``."""
    try:
        # splitlines would cut at U+2028, too, which JSON may hold
        lines = read(path, ROWS).split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        _note(damaged, f"{path} can't be read: {error}")
        return []
    values, wrong = [], 0
    for place, line in enumerate(lines):
        try:
            row = parse(line)
        except ValueError:
            wrong += bool(line.strip()) and place < len(lines) - 1
            continue
        if not isinstance(row, dict) or not all(
            fits(row[name], kind) for name, kind in (kinds or {}).items() if name in row
        ):
            wrong += 1
        elif (kinds or {}).keys() <= row.keys():  # else another program's
            values.append(row)
    if wrong:
        _note(damaged, f"{path}: {wrong} of {len(lines)} lines are damaged, and left out")
    return values


def inside(folder: Path, path: Path) -> bool:
    """Whether a path that was made of a name in a file stays below ``folder``, links followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False


def fits(value: object, kind: Callable[[object], bool]) -> bool:
    try:
        return bool(kind(value))
    except (TypeError, OverflowError, ValueError):
        return False


def number(value: object) -> bool:
    """A number that can be counted with and drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 1e30


def whole_number(value: object) -> bool:
    return isinstance(value, int) and number(value)


def text(value: object) -> bool:
    return isinstance(value, str)


def texts(value: object) -> bool:
    return isinstance(value, list) and all(map(text, value))


def tables(value: object) -> dict:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _note(damaged: list[str] | None, text: str) -> None:
    if damaged is not None and text not in damaged:
        damaged.append(text)


def _whole_number(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _mended(value):
    """The value with half characters (a lone \\ud8xx to \\udfxx) replaced: no file of UTF-8 holds
    them."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(one) for one in value]
    return {_mended(name): _mended(one) for name, one in value.items()} if isinstance(value, dict) else value
