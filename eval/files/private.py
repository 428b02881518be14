"""Read a file that holds a secret, which its owner alone may use. Standard library only: the
launcher reads its secrets by this, too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from eval.files import foreign


def read_private(path: Path, most: int, owner: int | None = None) -> str:
    """UTF-8 text of a regular file of at most ``most`` bytes that no one but its owner can use;
    ``owner``: the user's number that it must belong to, None for any.

    Raises OSError where it can't be opened, and ValueError that says what is wrong with it. No
    message holds a part of the text.
    """
    # The checks are of the file that is read, not of one put in its place.
    with open(foreign.open_regular(path), "rb") as file:
        info = os.fstat(file.fileno())
        if owner not in (None, info.st_uid):
            raise ValueError(f"belongs to user {info.st_uid}, you are {owner}; copy it to a file of yours")
        mode = stat.S_IMODE(info.st_mode)
        if excess := mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ValueError(
                f"others may use it (mode {mode:03o}, {excess:03o} too much): chmod 600 {path}, and change what it "
                "holds if the machine is shared"
            )
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
