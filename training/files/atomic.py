"""Files that are written atomically: a reader, also after a crash, sees the old content or the new.

Standard library only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a temporary file next to ``path``; at the end of the block it becomes
    ``path``, durably.

    Where the block raises, ``path`` stays as it was, and the temporary file (``<name>.new``) waits
    to be overwritten by the next call. Raises OSError where the file can't be written.
    """
    temporary = path.with_name(f"{path.name}.new")
    yield temporary
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a UTF-8 file atomically and durably. ``mode``: permissions, before the umask's bits are
    cleared. Raises OSError where it can't be written."""
    opener = partial(os.open, mode=mode)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", opener=opener) as file:
        file.write(text)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
