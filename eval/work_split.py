"""Work split over processes: each rank makes every n-th of what is missing; rank 0 puts together
what they made.

What is made does not depend on the number of ranks: each row has its own key, random numbers and
place in the order.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from eval import rendezvous
from eval.errors import Busy, DataError
from eval.files import rows
from eval.files.jsonl import dump, last_by, recover


@contextlib.contextmanager
def exclusive(output: str | Path) -> Iterator[None]:
    """Make the output folder and hold it: two starts would write to the same files. Raises
    DataError and Busy before anything is made."""
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataError(
            f"paths.output = {output}: {error.strerror}; expected a folder, or a place where one can be made"
        ) from None
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
    """Rank and number of ranks from RANK and WORLD_SIZE; alone without them. As a context it holds
    the connection between them."""

    def __init__(self):
        self.rank, self.world = rendezvous.place()

    def __enter__(self) -> Ranks:
        if self.world > 1:
            rendezvous.join("gloo", self.rank, self.world)
        return self

    def __exit__(self, *_) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def mine(self, items: Sequence) -> Sequence:
        """This rank's share: items alike in length and category lie side by side and go to
        different ranks."""
        return items[self.rank :: self.world]

    def own(self, path: Path) -> Path:
        """Where this rank appends rows that belong to ``path``: two processes never write to one
        file."""
        return path if self.rank == 0 else path.parent / f"rank-{self.rank}" / path.name

    def once(self, work: Callable[[], Any]) -> Any:
        """What ``work()`` gives on rank 0, on every rank; a DataError or Busy of it is every
        rank's."""
        if self.world == 1:
            return work()
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except (DataError, Busy) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def gather(self, path: Path, place: Callable[[dict], tuple], kinds: rows.Kinds) -> list[dict]:
        """All rows of ``path``, on every rank: rank 0 adds what other ranks have made, also in an
        earlier start that was cut off, in the order of ``place``. Rows without the fields of
        ``kinds`` are left out.

        Rows travel over the ranks' connection. A rank reads its own file alone: on another node a
        fresh file may be missing from a cached listing of its folder for half a minute.
        """
        own = _rows_or_error(self.own(path)) if self.rank else []
        received = [own]
        if self.world > 1:
            received = [None] * self.world if self.rank == 0 else None
            dist.gather_object(own, received, dst=0)
        all_rows = self.once(lambda: self._put_together(path, received, place, kinds))
        if self.rank:  # only now: what is in ``path`` can't be lost any more
            _remove(self.own(path))
        return all_rows

    def _put_together(
        self, path: Path, received: list, place: Callable[[dict], tuple], kinds: rows.Kinds
    ) -> list[dict]:
        for error in received:
            if isinstance(error, DataError):
                raise error
        left = [
            part
            # of an earlier start with more ranks
            for part in sorted(path.parent.glob(f"rank-*/{path.name}"))
            if part.parent.name[5:].isdigit() and int(part.parent.name[5:]) >= self.world
        ]
        new = rows.of_kind((row for part in [*map(recover, left), *received] for row in part), kinds)
        merged_rows = rows.of_kind(recover(path), kinds)
        if new:
            merged = last_by([*merged_rows, *new], place)
            merged_rows = [merged[key] for key in sorted(merged)]
            dump(path, merged_rows)
        for part in left:
            _remove(part)
        return merged_rows


def _rows_or_error(path: Path) -> list[dict] | DataError:
    try:
        return recover(path)
    except DataError as error:
        return error


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other files are in the folder, or it is gone
        part.parent.rmdir()
