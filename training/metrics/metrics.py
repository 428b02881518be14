"""Numbers of a run: one JSON line a logged iteration, TensorBoard events, and one plain line in the
log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from training.files import atomic


class Metrics:
    """Writer of ``<stage>/metrics.jsonl`` and ``<stage>/tensorboard/``; made on one rank only.

    ``mirrors``: trackers (training.metrics.trackers) that get the same numbers.

    On resume, rows beyond the resumed iteration are dropped first, so that the file reads as if
    nothing had happened.
    """

    def __init__(self, stage: str | Path, total: int, resumed: int = 0, mirrors: Sequence = ()):
        self.path, self.total = Path(stage) / "metrics.jsonl", total
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in self._lines() if json.loads(line)["iteration"] <= resumed]
        atomic.write_text(self.path, "".join(lines))
        self.file = self.path.open("a", encoding="utf-8")
        self.events = SummaryWriter(str(Path(stage) / "tensorboard"), purge_step=resumed + 1)
        self.started, self.resumed, self.mirrors = time.monotonic(), resumed, mirrors

    def _lines(self) -> list[str]:
        """Whole lines only: a killed run may leave half a line."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def log(self, iteration: int, headline: tuple[str, ...] = (), **values: float) -> None:
        """Append a row for ``iteration`` (from 1); the values named in ``headline`` are also
        printed, in one line."""
        row = {"iteration": iteration, "total": self.total, "time": round(time.time(), 3)}
        row.update({name: value if math.isfinite(value) else None for name, value in values.items()})
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.events.add_scalar(name, value, iteration)
        for mirror in self.mirrors:
            mirror.log(iteration, {name: value for name, value in values.items() if math.isfinite(value)})
        if headline:
            done = max(iteration - self.resumed, 1)
            left = (time.monotonic() - self.started) / done * (self.total - iteration)
            numbers = "  ".join(f"{name} {values[name]:.4g}" for name in headline if name in values)
            print(f"iteration {iteration}/{self.total}  {numbers}  ETA {left:.0f} s", flush=True)

    def show(self, iteration: int, samples: list[tuple[str, str]]) -> None:
        """Prompts with replies, in the log and as TensorBoard's text."""
        if samples:
            print(as_lines(samples), flush=True)
            self.events.add_text("samples", as_markdown(samples), iteration)

    def close(self) -> None:
        self.file.close()
        self.events.close()
        for mirror in self.mirrors:
            mirror.close()


def as_markdown(samples: list[tuple[str, str]]) -> str:
    """For TensorBoard: each prompt and its reply, line ends kept."""
    return "\n\n---\n\n".join(
        "\n".join(f"    {line}" for line in f"{prompt}⟶{reply}".splitlines()) for prompt, reply in samples
    )


def as_lines(samples: list[tuple[str, str]], longest: int = 300) -> str:
    """For the log: a line each, the end of a long prompt and the start of a long reply."""
    return "\n".join(
        f"  sample: {('...' + prompt[-longest:] if len(prompt) > longest else prompt)!r} -> {reply[:longest]!r}"
        for prompt, reply in samples
    )
