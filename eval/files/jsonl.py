"""JSON lines, read strictly and appended so that a kill never costs more than the line being
written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from eval.errors import DataError
from eval.files import foreign


def parse(text: str, source: str) -> list[dict]:
    """Objects of a JSON-lines text, blank lines skipped; raises DataError naming ``source`` and the
    line."""
    rows = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{source}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        except (ValueError, RecursionError):
            raise DataError(f"{source}, line {number}: a number too long or brackets too deep to be read") from None
        if not isinstance(row, dict):
            raise DataError(f"{source}, line {number}: expected an object, got {type(row).__name__}")
        if "\\ud" in line.lower() and not _encodable(row):
            raise DataError(
                f"{source}, line {number}: half a character (a lone "
                "\\ud8xx to \\udfxx), which no file of UTF-8 can hold"
            )
        rows.append(row)
    return rows


def _encodable(row: dict) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read(path: str | Path) -> list[dict]:
    """Objects of a JSON-lines file; raises DataError where it is missing, no regular file, too
    large, no UTF-8 or no JSON lines."""
    try:
        return parse(foreign.content(path, foreign.ROWS).decode(), str(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: {error}") from None


def recover(path: Path) -> list[dict]:
    """Rows of a file that this stage appends to: none where it is absent; a torn last line is cut
    off the file."""
    if not path.exists():
        return []
    try:
        content = foreign.content(path, foreign.ROWS)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)
    return read(path)


def append(path: Path, rows: Iterable[dict]) -> None:
    """Append ``rows`` and hand them to the operating system at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def last_by(rows: Iterable[dict], key: Callable[[dict], object]) -> dict:
    """Key -> row; where a key comes again, the last line wins."""
    return {key(row): row for row in rows}


def write(path: str | Path, text: str) -> None:
    """Write whole or not at all: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def dump(path: str | Path, rows: Iterable[dict]) -> None:
    """Replace a file's rows, whole or not at all."""
    write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
