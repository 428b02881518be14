"""A stage's folder: its checkpoints, which of them is the latest, and which one was chosen.

``<stage>/checkpoints/iter_0000100/`` is a complete checkpoint, or it is not there.
``<stage>/latest`` names the iteration that a resume and later stages begin from. Standard library
only.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from training.checkpoint import checksums
from training.config.trainer_config import TrainerConfig
from training.errors import ConfigError
from training.files import atomic

CHOSEN = "chosen.json"
"""Which checkpoint early stopping chose; written when the stage ends. The launcher reads it
(launcher/run/manifest.py)."""
PENDING = ".pending"
"""Suffix of ``latest`` while the checkpoint that it will name takes its place."""


class StageFolder:
    """The checkpoints of one stage. Methods that write are for one rank; the others read only."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._latest = self.path / "latest"

    def checkpoint(self, iteration: int) -> Path:
        """Where the checkpoint of ``iteration`` is, or will be."""
        return self.path / "checkpoints" / f"iter_{iteration:07d}"

    def temporary(self, iteration: int, purpose: str) -> Path:
        """Where to write the checkpoint of ``iteration`` until it is published. A name that begins
        with a dot is never taken for a checkpoint."""
        target = self.checkpoint(iteration)
        return target.with_name(f".{target.name}.{purpose}")

    def iterations(self) -> list[int]:
        """Iterations that are saved, ascending. Folders of other names (iter_0000100.old) are no
        checkpoints."""
        names = (path.name.removeprefix("iter_") for path in (self.path / "checkpoints").glob("iter_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def latest(self) -> int | None:
        """The iteration that ``latest`` names, or None without such a file. Raises ConfigError
        where it holds no number."""
        if not self._latest.is_file():
            return None
        text = self._latest.read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdigit():
            raise ConfigError(
                f"{self._latest} holds {text[:40]!r}, no iteration; {self._list_iterations()}: "
                "write one of them into it, or resume with --load-iteration"
            )
        return int(text)

    def resolve(self, iteration: int = 0) -> Path:
        """Folder of a saved iteration (0: the latest). Raises ConfigError that lists the saved
        iterations where this one is missing."""
        number = iteration or self.latest()
        if number not in self.iterations():
            name = "(last)" if number is None else number
            raise ConfigError(f"{self.path}: checkpoint of iteration {name} is not there; {self._list_iterations()}")
        return self.checkpoint(number)

    def _list_iterations(self) -> str:
        return f"present: {', '.join(map(str, self.iterations())) or 'none'}"

    def resume_iteration(self) -> int | None:
        """The iteration to resume from, None where nothing is saved.

        Repairs ``latest`` where a kill came between the renames of a checkpoint and of ``latest``.
        Raises ConfigError where there are checkpoints but no ``latest``: the right one is unknown,
        and a start from scratch would overwrite them.
        """
        saved, pending = self.iterations(), self._latest.with_suffix(PENDING)
        if not self._latest.exists() and pending.is_file():
            text = pending.read_text(encoding="utf-8").strip()
            if text.isdigit() and int(text) in saved:
                os.replace(pending, self._latest)
        if (iteration := self.latest()) is None and saved:
            raise ConfigError(
                f"{self._latest} is missing, but {self._list_iterations()}; a start from scratch would overwrite "
                f"them. To go on, write one of them into it (echo {saved[-1]} > {self._latest}); to start from "
                f"scratch, take another --name, or move {self.path / 'checkpoints'} away"
            )
        return iteration

    def set_latest(self, iteration: int) -> None:
        """Make a saved iteration the one that a resume and later stages begin from."""
        atomic.write_text(self._latest, f"{iteration}\n")

    def publish(self, temporary: Path, iteration: int, digests: dict[str, str] | None = None) -> None:
        """Make the complete checkpoint in ``temporary`` the stage's iteration, durably: write its
        checksums, fsync, rename it, then move ``latest``.

        ``digests``: sha256 by file name below ``temporary`` where they are known; other files are
        read. Raises OSError where a newer attempt of the stage has begun.
        """
        self._check_attempt()
        target, pending = self.checkpoint(iteration), self._latest.with_suffix(PENDING)
        checksums.write(temporary, digests)
        for path in sorted(temporary.rglob("*")) + [temporary]:
            atomic.sync(path)
        atomic.write_text(pending, f"{iteration}\n")
        if target.exists():
            # a kill between here and the end must not leave ``latest`` naming nothing
            if self.latest() == iteration:
                self._latest.unlink()
            _remove(target)
        os.replace(temporary, target)
        atomic.sync(target.parent)
        os.replace(pending, self._latest)
        atomic.sync(self.path)

    def _check_attempt(self) -> None:
        """Raise OSError where the launcher has begun a newer attempt of this stage; ``.attempt``
        holds its number. A node that Slurm gave up may still compute, and must not write among the
        newer attempt's checkpoints."""
        own, path = os.environ.get("CONVOY_ATTEMPT"), self.path / ".attempt"
        if own and path.exists() and (newest := path.read_text(encoding="utf-8").strip()) != own:
            raise OSError(f"attempt {newest} of {self.path.name} has begun: attempt {own} saves no more")

    def prune(self, iteration: int, trainer: TrainerConfig, best: int = 0) -> None:
        """Delete old checkpoints after ``iteration`` was saved.

        It keeps this one, ``best`` (0: none), the ``keep_checkpoints`` newest at a multiple of
        ``save_every``, and all at a multiple of ``keep_every``. A checkpoint that a signal asked
        for therefore never replaces one that a later stage may name by its number.
        """
        saved = self.iterations()
        regular = [number for number in saved if number % trainer.save_every == 0]
        keep = {iteration, best, *regular[-trainer.keep_checkpoints :]}
        if trainer.keep_every:
            keep |= {number for number in saved if number % trainer.keep_every == 0}
        for number in set(saved) - keep:
            _remove(self.checkpoint(number))

    def clear(self) -> None:
        """Delete what killed saves and deletions left behind."""
        for path in (self.path / "checkpoints").glob(".iter_*"):
            shutil.rmtree(path)

    def choose(self, iteration: int, record: dict) -> None:
        """Record durably that later stages use ``iteration``, and make it ``latest``."""
        atomic.write_text(self.path / CHOSEN, json.dumps({**record, "iteration": iteration}, indent=1) + "\n")
        self.set_latest(iteration)

    def chosen(self) -> dict | None:
        """What ``choose`` recorded, with its "iteration"; None where nothing was chosen or
        ``latest`` was moved since."""
        path = self.path / CHOSEN
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["iteration"] == self.latest() else None

    def withdraw_choice(self) -> None:
        """Training goes on: what was chosen before no longer holds."""
        path = self.path / CHOSEN
        if path.exists():
            path.unlink()
            atomic.sync(self.path)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. A kill half way leaves nothing that counts as one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)
