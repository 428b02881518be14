"""``SHA256``: the checksums of a checkpoint's files, in sha256sum's format. Standard library only,
because the launcher uses it, too.

Every ``iter_0000100/`` holds one, written last, so ``cd iter_0000100 && sha256sum -c SHA256``
checks it by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from training.errors import Damaged
from training.files.safe_files import Unfit, read_text

NAME = "SHA256"
Name = TypeVar("Name", str, Path)
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def digest(path: str | Path) -> str:
    """sha256 of a file, hex. The hash runs without Python's lock: threads add up."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
    return sha256.hexdigest()


def touched(path: str | Path) -> list[int]:
    """A file's size, inode, mtime and ctime: they change with every write through the kernel, and
    no program can set ctime back."""
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def mark(path: str | Path, weights: bool = False) -> dict:
    """What ``same`` recognises a file by: its sha256, and what changes when it is written.

    ``weights``: the sha256 covers only blocks of the file. Weights are large, and other weights
    differ everywhere.
    """
    before = touched(path)
    return {"sampled": sampled(path), "touched": before} if weights else {"sha256": digest(path), "touched": before}


def sampled(path: str | Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """sha256 of a file's length and of ``blocks`` evenly spread blocks of ``size`` bytes, its ends
    among them."""
    length = os.stat(path).st_size
    sha256 = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(max(0, length - size) * block // max(1, blocks - 1))
            sha256.update(file.read(size))
    return sha256.hexdigest()


def same(path: str | Path, marked: dict) -> bool:
    """Whether a file still has the content of which ``mark`` returned ``marked``. Its bytes are
    read only if it was touched since. Raises OSError where it can't be read."""
    if touched(path) == marked["touched"]:
        return True
    return sampled(path) == marked["sampled"] if "sampled" in marked else digest(path) == marked["sha256"]


def files(folder: str | Path) -> list[str]:
    """Every file below ``folder`` that its SHA256 has to list, relative, sorted."""
    folder = Path(folder)
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != NAME)


def digests(folder: str | Path, names: Collection[Name]) -> dict[Name, str]:
    """sha256 of each of the files ``names`` below ``folder`` ("": they are paths), several at a
    time."""
    from concurrent.futures import ThreadPoolExecutor  # late: it slows the launcher's commands down

    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(names, pool.map(lambda name: digest(Path(folder, name)), names), strict=True))


def write(folder: str | Path, known: dict[str, str] | None = None) -> None:
    """Write ``folder``/SHA256, durably. ``known``: digests by file name; all other files are
    read."""
    known = known or {}
    listed = {**known, **digests(folder, [name for name in files(folder) if name not in known])}
    with open(Path(folder, NAME), "w", encoding="utf-8") as file:
        file.writelines(f"{listed[name]}  {name}\n" for name in sorted(listed))
        file.flush()
        os.fsync(file.fileno())


def read(folder: str | Path) -> dict[str, str]:
    """File name -> digest as SHA256 lists them. Raises Damaged where it is missing, empty or not in
    its format."""
    path = Path(folder, NAME)
    try:
        text = read_text(path)
    except FileNotFoundError:
        older = f"cd {folder} && find . -type f -printf '%P\\0' | xargs -0 sha256sum > /tmp/{NAME} && mv /tmp/{NAME} ."
        raise Damaged(
            f"{path} is missing: not a complete checkpoint",
            f"{_fix(folder)}. If it is whole and only older than checksums: {older}",
        ) from None
    except Unfit as error:
        raise Damaged(str(error), _fix(folder)) from None
    matches = [_LINE.fullmatch(line) for line in text.splitlines()]
    if not text.endswith("\n") or not all(matches):
        raise Damaged(f"{path} is not a list of sha256 sums: truncated or overwritten", _fix(folder))
    listed = {match[2]: match[1] for match in matches if match}
    outside = [name for name in listed if name.startswith("/") or ".." in Path(name).parts]
    if outside:
        raise Damaged(f"{path} names {outside[0]}, which is not below {folder}", _fix(folder))
    return listed


def check(folder: str | Path, below: str = "", largest: int | None = None) -> dict[str, str]:
    """Compare the files of ``folder`` with its SHA256 -> digests of those that were read. Raises
    Damaged, naming the file, where one is missing or changed.

    ``below`` limits the check to a sub-folder ("policy"). Files above ``largest`` bytes only have
    to exist.
    """
    listed = select(read(folder), below)
    sizes = present(folder, listed)
    return compare(folder, listed, [name for name in listed if largest is None or sizes[name] <= largest])


def select(listed: dict[str, str], below: str) -> dict[str, str]:
    """Those of the listed files that are in the sub-folder ``below`` ("": all)."""
    return {name: sha256 for name, sha256 in listed.items() if not below or name.startswith(f"{below}/")}


def present(folder: str | Path, listed: Collection[str]) -> dict[str, int]:
    """Size of each listed file, bytes. Raises Damaged for the first that is missing."""
    sizes = {}
    for name in listed:
        path = Path(folder, name)
        if not path.is_file():
            raise Damaged(f"{path} is missing, but {NAME} lists it", _fix(folder))
        sizes[name] = path.stat().st_size
    return sizes


def compare(folder: str | Path, listed: dict[str, str], names: Collection[str]) -> dict[str, str]:
    """Digests of the files ``names``. Raises Damaged for the first that differs from ``listed``."""
    computed = digests(folder, names)
    for name, sha256 in computed.items():
        if sha256 != listed[name]:
            path = Path(folder, name)
            raise Damaged(
                f"{path} ({path.stat().st_size:,} bytes) does not have "
                f"the sha256 that {NAME} lists: truncated or changed",
                _fix(folder),
            )
    return computed


def _fix(folder: str | Path) -> str:
    number = Path(folder).name.removeprefix("iter_").lstrip("0") or "0"
    others = sorted(
        int(path.name[5:])
        for path in Path(folder).parent.glob("iter_*")
        if path.name[5:].isdigit() and path != Path(folder)
    )
    if not others:
        return f"It can't be used; remove {folder}"
    saved = ", ".join(map(str, others))
    return f"It can't be used; resume from another with --load-iteration (there are: {saved}), not from {number}"
