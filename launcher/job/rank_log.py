"""The log of one attempt: what all ranks print, by time and rank, and the last words of each."""

from __future__ import annotations

import collections
import contextlib
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import key_file
from launcher.job.outcome import EXCEPTION, REPORTED_KINDS, LastWords, RankExit
from launcher.run.folder import write_json
from training.files.safe_files import Unfit, read_table

LINES = 20
"""Last lines kept of each rank."""
LAST_WORDS_BYTES = 1 << 16
"""Most bytes of a rank's last words."""


@dataclass
class Log:
    """The merged log of one attempt; lines are ``time [rank] text``, those of srun ``time [srun]
    text``, time of this machine."""

    path: Path
    secrets: dict = field(default_factory=dict)
    """Variables whose values must not be in it."""
    last_exceptions: dict = field(default_factory=dict)
    """Rank -> its last exception."""
    lines: dict = field(default_factory=lambda: collections.defaultdict(lambda: collections.deque(maxlen=LINES)))
    """Tag -> its last lines."""
    last_output_at: float = field(default_factory=time.monotonic)
    """When anything was written last."""

    def __post_init__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # of an attempt of the same number, in a folder begun again
        shutil.rmtree(self.report_folder, ignore_errors=True)
        self.file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by wait()
        self.writing = threading.Lock()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.file.close()

    def write(self, tag: int | str, text: str) -> None:
        with self.writing:
            text = key_file.mask(text, self.secrets)
            self.last_output_at, now = time.monotonic(), time.time()
            stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(now))}.{int(now * 1000) % 1000:03d}"
            # a full disk, a closed file: neither may stop the rank nor hide how it ended
            with contextlib.suppress(OSError, ValueError):
                self.file.write(f"{stamp} [{tag}] {text}\n")
            # torch tags the traceback of an uncaught exception
            text = re.sub(r"^\[rank\d+\]: ?", "", text).strip()
            if not text.strip(" ^~"):
                return
            if EXCEPTION.match(text):
                bare = ":" not in text and self.lines[tag]
                self.last_exceptions[tag] = f"{text} at `{self.lines[tag][-1]}`" if bare else text
            self.lines[tag].append(text)

    def lost_node(self) -> bool:
        """Whether srun has said that a node is gone."""
        return any("Node failure on" in line for line in self.lines["srun"])

    @property
    def report_folder(self) -> Path:
        """Folder in which the ranks leave their versions and their last words."""
        return self.path.with_suffix(".words")

    def rank_exit(self, rank: int | None, code: int) -> RankExit:
        lines = tuple(self.lines["srun" if rank is None else rank])
        line = self.last_exceptions.get(rank, lines[-1] if lines else "")
        return RankExit(code, rank, line, lines, self.last_words(rank))

    def last_words(self, rank: int | None) -> LastWords | None:
        """What a rank left in its file; where srun does not say which rank failed, the first that
        left something."""
        folder = self.report_folder
        files = [folder / f"rank_{rank}.json"] if rank is not None else sorted(folder.glob("rank_*.json"))
        for file in files:
            with contextlib.suppress(OSError, Unfit, LookupError, TypeError):
                report = read_table(file, LAST_WORDS_BYTES)
                message = key_file.mask(str(report["message"]), self.secrets)
                if message != report["message"]:
                    write_json(file, {**report, "message": message})
                return LastWords(REPORTED_KINDS[report["class"]] if report["class"] else None, message)
        return None
