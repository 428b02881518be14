"""A checkpoint's checksums, each file's checked right before its first use: the bytes come from the
disk once, not twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from threading import Lock

from training.checkpoint import checksums
from training.errors import Damaged


class Intact:
    """The files of ``source``, a model's folder in a checkpoint (iter_0000100/model). Threads may
    share it.

    What describes the tensors is checked at once, and that all files are there. Raises Damaged,
    naming the file. Without a list of checksums nothing is checked, unless it is ``required``: then
    it is Damaged, too.
    """

    def __init__(self, source: Path, required: bool = False):
        self.checkpoint, self.below = source.parent, source.name
        self.listed: dict[str, str] = {}
        if required or (self.checkpoint / checksums.NAME).is_file():
            self.listed = checksums.select(checksums.read(self.checkpoint), self.below)
            checksums.present(self.checkpoint, self.listed)
        self.locks = {name: Lock() for name in self.listed}
        self.checked: set[str] = set()
        self.check(Path(name).name for name in self.listed if not name.endswith(".distcp"))

    def check(self, files: Iterable[str] | None = None) -> None:
        """Raise Damaged unless these files (names within the folder; default: all) have their
        checksums. Each is read once."""
        names = self.listed if files is None else [f"{self.below}/{file}" for file in files]
        for name in names if self.listed else ():
            if name not in self.listed:
                raise Damaged(f"{self.checkpoint / name} is not in {checksums.NAME}: it is not of this checkpoint")
            with self.locks[name]:
                if name not in self.checked:
                    checksums.compare(self.checkpoint, self.listed, [name])
                    self.checked.add(name)
