"""``SHA256``: the checksums of a checkpoint's files, in sha256sum's format. Standard library only;
the launcher uses it, too.

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
    made = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            made.update(block)
    return made.hexdigest()


def touched(path: str | Path) -> list[int]:
    """What changes with every write to a file that goes through the kernel: size, inode, and the
    times of the last change of content and of anything else, which no program can set back."""
    status = os.stat(path)
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def mark(path: str | Path, weights: bool = False) -> dict:
    """What ``same`` tells a file by: its sha256, and what changes when it is written. Of
    ``weights`` it is the sha256 of their ends and of blocks between: others differ everywhere, and
    they are large."""
    before = touched(path)
    return {"sampled": sampled(path), "touched": before} if weights else {"sha256": digest(path), "touched": before}


def sampled(path: str | Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """sha256 of a file's length and of ``blocks`` evenly spread blocks of ``size`` bytes, its ends
    among them."""
    length = os.stat(path).st_size
    made = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(max(0, length - size) * block // max(1, blocks - 1))
            made.update(file.read(size))
    return made.hexdigest()


def same(path: str | Path, known: dict) -> bool:
    """Whether a file has the content that ``mark`` saw. Its bytes are read only where it was
    touched since, so a file of any size costs one look. Raises OSError where it can't be read."""
    if touched(path) == known["touched"]:
        return True
    return sampled(path) == known["sampled"] if "sampled" in known else digest(path) == known["sha256"]


def files(folder: str | Path) -> list[str]:
    """Every file below ``folder`` that its SHA256 has to list, relative, sorted."""
    folder = Path(folder)
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != NAME)


def digests(folder: str | Path, names: Collection[Name]) -> dict[Name, str]:
    """sha256 of each of the files ``names`` of ``folder`` ("": of paths as they are), several at a
    time."""
    from concurrent.futures import ThreadPoolExecutor  # late: the launcher's commands are quick

    with ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0)))) as pool:
        return dict(zip(names, pool.map(lambda name: digest(Path(folder, name)), names), strict=True))


def write(folder: str | Path, known: dict[str, str] | None = None) -> None:
    """Write ``folder``/SHA256, durably: digests in ``known`` are taken as they are, other files are
    read."""
    known = known or {}
    made = {**known, **digests(folder, [name for name in files(folder) if name not in known])}
    with open(Path(folder, NAME), "w", encoding="utf-8") as file:
        file.writelines(f"{made[name]}  {name}\n" for name in sorted(made))
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
    """Digests of the files that SHA256 lists; raises Damaged, naming the file, where one is gone or
    changed.

    ``below`` limits the check to a sub-folder ("policy"); ``largest`` (bytes) to files up to that
    size: of others only presence is checked.
    """
    listed = select(read(folder), below)
    sizes = present(folder, listed)
    return compare(folder, listed, [name for name in listed if largest is None or sizes[name] <= largest])


def select(listed: dict[str, str], below: str) -> dict[str, str]:
    """Those of the listed files that are in the sub-folder ``below`` ("" = all)."""
    return {name: known for name, known in listed.items() if not below or name.startswith(f"{below}/")}


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
    """Raise Damaged for the first of ``names`` whose content is not what ``listed`` says; their
    digests."""
    content = digests(folder, names)
    for name, found in content.items():
        if found != listed[name]:
            path = Path(folder, name)
            raise Damaged(
                f"{path} ({path.stat().st_size:,} bytes) does not have "
                f"the sha256 that {NAME} lists: truncated or changed",
                _fix(folder),
            )
    return content


def _fix(folder: str | Path) -> str:
    number = Path(folder).name.removeprefix("iter_").lstrip("0") or "0"
    others = sorted(
        int(path.name[5:])
        for path in Path(folder).parent.glob("iter_*")
        if path.name[5:].isdigit() and path != Path(folder)
    )
    if not others:
        return f"It can't be used; remove {folder}"
    there = ", ".join(map(str, others))
    return f"It can't be used; resume from another with --load-iteration (there are: {there}), not from {number}"
