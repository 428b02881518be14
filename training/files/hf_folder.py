"""A Hugging Face folder from another source: which of its files are read, and up to which size.

Everything that reads a checkpoint's small files calls ``file`` or ``json_object``. They refuse a
name that is a link out of the folder, a text longer than such a text can be, and JSON that is no
object or that parsers read differently. Standard library only.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from training.errors import ConfigError
from training.files import safe_files

MB = 2**20
SIZES = {
    "tokenizer.json": 64 * MB,
    "tokenizer.model": 64 * MB,
    "vocab.json": 32 * MB,
    "merges.txt": 32 * MB,
    "model.safetensors.index.json": 64 * MB,
    "pytorch_model.bin.index.json": 64 * MB,
}
"""File name -> most bytes that are read. The largest known tokenizer.json has 33 MiB."""
SIZE = 8 * MB
"""Most bytes that are read of a file with another name."""
AGAIN = "download it again"


def file(folder: str | Path, name: str, links: bool = False) -> Path | None:
    """Path of the folder's file ``name``, or None where there is none.

    ``links``: accept a link to any place. Links within the folder are always accepted, and so are
    those of Hugging Face's cache, where snapshots/HASH/NAME link to blobs. Raises ConfigError for a
    link to another place and for a folder, a pipe or a device.
    """
    path = Path(folder) / name
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise ConfigError(
                f"model.checkpoint: {path} is a link to {_shown_link(path)}, which is not there; {AGAIN}"
            ) from None
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.checkpoint: {path} can't be read ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(kind):
        raise ConfigError(f"model.checkpoint: {path} is no file (a folder, a pipe or a device); {AGAIN}")
    if not links and not _within(path.resolve(), Path(folder)):
        raise ConfigError(
            f"model.checkpoint: {path} is a link to {_shown_link(path)}, outside the folder: an export "
            "would copy that file; if it is what you want, put the file itself there: cp "
            f"--remove-destination $(realpath {name}) {name}"
        )
    return path


def outside(folder: str | Path, path: Path) -> bool:
    """True if ``path`` is a link that leaves the folder and the blobs of Hugging Face's cache."""
    return not _within(path.resolve(), Path(folder))


def read_text(folder: str | Path, name: str) -> str | None:
    """Text of the folder's file ``name``, or None where there is none. Raises ConfigError as
    ``file`` does, and for a file that is too large or is not UTF-8."""
    path = file(folder, name)
    if path is None:
        return None
    most = SIZES.get(name, SIZE)
    try:
        content = safe_files.read_bytes(path, most)
        if content.startswith(b"version https://git-lfs"):
            raise ConfigError(f"model.checkpoint: {path} is a git-LFS pointer; fetch the file with `git lfs pull`")
        return content.decode("utf-8")
    except safe_files.Unfit as error:
        raise ConfigError(f"model.checkpoint: {error}, or no {name} of a model; {AGAIN}") from None
    except OSError as error:
        raise ConfigError(f"model.checkpoint: {path} can't be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.checkpoint: {path} is not UTF-8 at byte {error.start}; {AGAIN}") from None


def json_object(folder: str | Path, name: str) -> dict | None:
    """The JSON object in the folder's file ``name``, or None where there is no such file. Raises
    ConfigError as ``read_text`` and ``parse`` do."""
    text = read_text(folder, name)
    return None if text is None else parse(text, Path(folder) / name)


def parse(text: str, path: Path) -> dict:
    """Parse ``text`` as a JSON object.

    Raises ConfigError that names ``path`` for other JSON, a number with thousands of digits, deep
    nesting, or a key with two values. NaN and Infinity pass: the reader of each field refuses them.
    """
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"model.checkpoint: {path} can't be read as JSON ({shown(str(error), 120)}); {AGAIN}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"model.checkpoint: {path} holds no JSON object but {shown(values)}; {AGAIN}")
    return values


def is_text(value) -> bool:
    """True for a string without halves of surrogate pairs. JSON can hold these, but no other
    program accepts them."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def shown(value, most: int = 80) -> str:
    """``value`` as an error shows it: on one line, without control characters, at most ``most``
    characters and "...".

    A string stays as it is, except for unprintable characters, which are escaped. Other values
    appear as ``repr`` writes them.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a whole number of more digits than Python writes, or deep nesting
        return f"a {type(value).__name__} too large to show"
    if not text[: most + 1].isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + "..."


def _unique(pairs: list[tuple]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: dict = {}
        for key, value in pairs:
            if key in seen and (type(seen[key]) is not type(value) or seen[key] != value):
                raise ValueError(f"{shown(repr(key))} is there twice, with two values")
            seen[key] = value
    return values


def _within(path: Path, folder: Path) -> bool:
    """True if the resolved ``path`` is in the folder, or among the blobs of the Hugging Face cache
    that holds the folder."""
    real = folder.resolve()
    if path.is_relative_to(real):
        return True
    cache = next((parent.parent for parent in (real, *real.parents) if parent.parent.name == "snapshots"), None)
    if cache is None:
        return False
    blobs = cache.parent / "blobs"
    return not blobs.is_symlink() and path.parent == blobs


def _shown_link(path: Path) -> str:
    try:
        return shown(os.readlink(path))
    except OSError:
        return "another place"
