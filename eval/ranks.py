"""Work split over processes: each rank makes every n-th of what is missing, in a file of its own; rank 0 puts the files together.

What is made does not depend on the number of ranks: each row has its own key, random numbers and place in the order.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from eval.errors import Busy, DataError
from eval.jsonl import dump, last_by, recover


@contextlib.contextmanager
def alone(output: str | Path) -> Iterator[None]:
    """Make the output folder and hold it: two starts would write to the same files. Raises DataError and Busy before anything is made."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(f"paths.output = {output}: {error.strerror}; expected a folder, or a place where one can be made") from None
    try:
        if not os.access(output, os.W_OK | os.X_OK):
            raise DataError(f"paths.output = {output}: no permission to write there")
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another start is at work in {output}: wait for it, or name another output folder") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(folder)


class Ranks:
    """Rank and number of ranks from RANK and WORLD_SIZE; alone without them. As a context it holds the connection between them."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

    def __enter__(self) -> Ranks:
        if self.world > 1:  # a rank may wait a day for the slowest; one that dies breaks the connection at once
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        return self

    def __exit__(self, *_) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def meet(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def mine(self, items: Sequence) -> Sequence:
        """This rank's share: items alike in length and category lie side by side and go to different ranks."""
        return items[self.rank::self.world]

    def own(self, path: Path) -> Path:
        """Where this rank appends rows that belong to ``path``: two processes never write to one file."""
        return path if self.rank == 0 else path.parent / f"rank-{self.rank}" / path.name

    def gather(self, path: Path, place: Callable[[dict], tuple]) -> None:
        """Rank 0 moves what others have made, also in an earlier start that was cut off, into ``path``, in the order of ``place``."""
        self.meet()
        parts = sorted(path.parent.glob(f"rank-*/{path.name}")) if self.rank == 0 else []
        if parts:
            rows = last_by([row for file in (path, *parts) for row in recover(file)], place)
            dump(path, [rows[key] for key in sorted(rows)])
            for part in parts:
                part.unlink()
                if not any(part.parent.iterdir()):
                    shutil.rmtree(part.parent)
        self.meet()
