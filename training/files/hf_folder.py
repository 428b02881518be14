"""A Hugging Face folder that comes from elsewhere: which of its files are taken in, and how large.

Standard library only. Everything that reads a checkpoint's small files asks ``file`` or
``json_object``: a name is a file of the folder and no link to another place, a text is as long as
such a text can be, and JSON is an object without values that only some parsers know.
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
"""Bytes of the largest file of a name that is read; the largest tokenizer.json known has 33 MiB."""
SIZE = 8 * MB
"""Of the other files."""
AGAIN = "download it again"


def file(folder: str | Path, name: str, links: bool = False) -> Path | None:
    """The folder's file ``name``; None where there is none. ``links``: it may be a link to
    anywhere.

    Links within the folder are ordinary, and those of Hugging Face's cache, whose
    snapshots/HASH/NAME are links into its blobs. Raises ConfigError for a link to another place,
    and for what is no file (a folder, a pipe, a device).
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
    """Is ``path`` a link to another place than the folder, or than the blobs of Hugging Face's
    cache?"""
    return not _within(path.resolve(), Path(folder))


def read_text(folder: str | Path, name: str) -> str | None:
    """None where there is no such file. Raises ConfigError as ``file``, and for what is too large
    or no UTF-8."""
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
    """The JSON object that the folder's file ``name`` holds; None where there is no such file."""
    text = read_text(folder, name)
    return None if text is None else parse(text, Path(folder) / name)


def parse(text: str, path: Path) -> dict:
    """The JSON object ``text``. Raises ConfigError, naming ``path``, for other JSON, and for a
    number of thousands of digits, deep nesting and a key with two values. NaN and Infinity are the
    fields' to refuse."""
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
    """A string of whole characters: JSON can hold halves of surrogate pairs, which no other program
    takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def shown(value, most: int = 80) -> str:
    """``value`` for an error's text: on one line, without control characters, and not longer than
    it helps.

    A text is given as it is, but for what is not printable; everything else as Python writes it.
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
    """Does ``path``, resolved, lie in the folder, or among the blobs of the hub's cache around
    it?"""
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
