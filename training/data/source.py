"""Read a file of rows: check its format by the first bytes, then give its lines, none longer than
MAX_LINE.

A compressed file is recognised by its bytes, not by its name. Another format is an error that names
it and says how to convert it to lines of JSON. Memory grows neither with a line nor with the size
of the unpacked file. Standard library only.
"""

from __future__ import annotations

import gzip
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from training.errors import DataError
from training.files import safe_files

MAX_LINE = 16 << 20
"""Most bytes of a line: text of about four million tokens."""
FREE_BYTES, MAX_RATIO = 16 << 20, 200
"""A file may unpack to FREE_BYTES, and beyond them to MAX_RATIO times its size. Text shrinks to a
third or a tenth, a file that is built to fill the memory to a thousandth."""
MAX_EMPTY = 10_000
"""Most empty lines in a row: a file with more holds no rows."""
HEAD = 4096
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
_PANDAS = (
    'convert it to lines of JSON: python -c "import pandas; '
    "pandas.{read}({file!r}{more}).to_json({lines!r}, orient='records', lines=True)\""
)
_UNPACK = "unpack it: {command} {file} > {lines}"
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a git-LFS pointer, not the data itself", "fetch it with `git lfs pull`"),
    (b"PAR1", "a Parquet file", _PANDAS.replace("{read}", "read_parquet").replace("{more}", "")),
    (b"ARROW1", "an Arrow (Feather) file", _PANDAS.replace("{read}", "read_feather").replace("{more}", "")),
    (
        b"\xff\xff\xff\xff",
        "an Arrow stream, as `datasets` saves it",
        "convert it to lines of JSON: "
        'python -c "import datasets; datasets.Dataset.from_file({file!r}).to_json({lines!r})"',
    ),
    (b"ORC", "an ORC file", _PANDAS.replace("{read}", "read_orc").replace("{more}", "")),
    (b"Obj\x01", "an Avro file", "convert it to JSON lines: fastavro {file} > {lines}"),
    (b"PK\x03\x04", "a zip archive", _UNPACK.replace("{command}", "unzip -p")),
    (b"PK\x05\x06", "an empty zip archive", "give the file that it should hold"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", _UNPACK.replace("{command}", "zstd -dc")),
    (b"\xfd7zXZ\x00", "compressed with xz", _UNPACK.replace("{command}", "xz -dc")),
    (b"BZh", "compressed with bzip2", _UNPACK.replace("{command}", "bzip2 -dc")),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it: 7z x {file}"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", _UNPACK.replace("{command}", "lz4 -dc")),
    (b"\x89HDF", "an HDF5 file", "convert it to lines of JSON"),
    (b"\x93NUMPY", "a NumPy array", "give the text, as lines of JSON"),
    (b"SQLite format 3", "an SQLite database", "convert a table to lines of JSON"),
    (b"%PDF", "a PDF", "give the text, as lines of JSON"),
    (b"\x80\x02", "a pickle", "convert it to lines of JSON"),
    (b"\x80\x03", "a pickle", "convert it to lines of JSON"),
    (b"\x80\x04", "a pickle", "convert it to lines of JSON"),
    (b"\x80\x05", "a pickle", "convert it to lines of JSON"),
    (b"\xff\xfe", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 {file} > {lines}"),
    (b"\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 {file} > {lines}"),
    (b"\x00\x00\xfe\xff", "text in UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 {file} > {lines}"),
)
"""(first bytes, format of a file that begins with them, fix). UTF-32LE begins as UTF-16LE does."""


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, bytes) of every line that is not blank. Raises DataError for what holds no
    lines of JSON, for a line of more than MOST bytes, and where the file can't be read."""
    path = Path(path)
    try:
        with open(_open(path), "rb") as file:
            packed = file.read(len(GZIP)) == GZIP
            file.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    yield from _limited(path, unpacked, file)
            else:
                yield from _limited(path, file, None)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {_reason(error)}") from None


def _open(path: Path) -> int:
    try:
        return safe_files.open_regular(path)
    except safe_files.Unfit:
        kind = (
            "a folder: name the file in it"
            if path.is_dir()
            else "a pipe, a socket or a device: rows are read more than once, so write them to a file"
        )
        raise DataError(f"{path} is {kind}; expected a .jsonl or .jsonl.gz file") from None


def _limited(path: Path, file: BinaryIO, packed: BinaryIO | None) -> Iterator[tuple[int, bytes]]:
    number, size, empty, check = 0, 0, 0, FREE_BYTES
    if reason := named(path, file.read(HEAD)):
        raise DataError(f"{path}: {reason}")
    file.seek(0)
    while line := file.readline(MAX_LINE + 1):
        number, size = number + 1, size + len(line)
        if number == 1:
            line = line.removeprefix(BOM)  # a byte-order mark is no part of the JSON
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE >> 20} MiB; expected one row on each line")
        if packed and size > check:
            if size > MAX_RATIO * packed.tell():
                raise DataError(
                    f"{path}: unpacks to more than {MAX_RATIO} times its size within the first {number:,} "
                    "lines, as no text does; if it is right all the same, unpack it: "
                    f"gzip -dc {path} > {path.with_suffix('')}"
                )
            check += FREE_BYTES
        if line.strip():
            empty = 0
            yield number, line
            continue
        empty += 1
        if empty > MAX_EMPTY:
            raise DataError(
                f"{path}:{number}: more than {MAX_EMPTY:,} empty lines in a row; expected one row on each line"
            )


def named(path: Path, head: bytes) -> str:
    """Format of a file that begins with ``head``, and the fix; "" where it may hold lines of
    JSON."""
    name, to = str(path), _as_lines(path)
    substitutions = {
        "{file!r}": repr(name),
        "{lines!r}": repr(to),
        "{file}": shlex.quote(name),
        "{lines}": shlex.quote(to),
    }

    def described(what: str, fix: str) -> str:
        for key, value in substitutions.items():
            fix = fix.replace(key, value)
        return f"{what}; {fix}"

    for start, what, fix in FORMATS:
        if head.startswith(start):
            return described(what, fix)
    return described(*text) if (text := _text_format(head.removeprefix(BOM).lstrip())) else ""


def _text_format(head: bytes) -> tuple[str, str] | None:
    """(format of a text that begins with ``head``, fix), or None for what may be lines of JSON."""
    first = head.partition(b"\n")[0].strip()
    if head.startswith(GZIP):
        return "compressed twice", _UNPACK.replace("{command}", "gzip -dc")
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it: tar xf {file}"
    if b"\0" in head[:64]:
        if b"\0" in head[:2]:
            return "text in UTF-16 without a mark", "convert it: iconv -f UTF-16LE -t UTF-8 {file} > {lines}"
        return "not text", "give a .jsonl file"
    if head.startswith(b"<"):
        return "a web page or XML", "fetch the file itself (a link that needs a login gives the login's page)"
    if head.startswith(b"["):
        return "a JSON array", (
            'each row is a line of its own: python -c "import json; '
            '[print(json.dumps(row)) for row in json.load(open({file!r}))]" > {lines}'
        )
    if first == b"{":
        return "JSON that is spread over several lines", "each row is a line of its own: jq -c . {file} > {lines}"
    marked = b'",' in first if first.startswith(b'"') else b"," in first or b"\t" in first
    if marked and not first.startswith(b"{") and b"\n{" not in head:
        comma = "" if b"," in first else ", sep='\\t'"
        return "a table (CSV or TSV) or plain text", _PANDAS.replace("{read}", "read_csv").replace("{more}", comma)
    return None


def _as_lines(path: Path) -> str:
    """A name for the file that the fix writes."""
    stem = path.name.partition(".")[0] or "rows"
    return str(path.with_name(f"{stem}.jsonl" if path.name != f"{stem}.jsonl" else f"{stem}.lines.jsonl"))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", "") or str(error) or type(error).__name__
