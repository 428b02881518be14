"""The merged log of a stage: print it, follow it into its next attempts."""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.pipeline import STAGES
from launcher.run import Run, is_alive
from training.config import ConfigError


def attempts(run: Run, stage: str) -> list[Path]:
    """Logs of all attempts of a stage, in order."""
    found = (run.stage(stage) / "logs").glob("attempt_*.log")
    return sorted(found, key=lambda path: int(re.sub(r"\D", "", path.stem)))


def newest_stage(run: Run) -> str:
    """The stage whose log was written last; ConfigError when none has begun."""
    written = {name: paths[-1].stat().st_mtime for name in STAGES if (paths := attempts(run, name))}
    if not written:
        raise ConfigError(f"no stage of {run.folder} has written a log yet; status {run.folder} says what it waits for")
    return max(written, key=lambda name: written[name])


def lines(run: Run, stage: str, follow: bool) -> Iterator[str]:
    """Lines of the newest attempt, and with ``follow`` those still to come, until the stage has ended."""
    begin = max(0, len(attempts(run, stage)) - 1)
    if not attempts(run, stage) and not follow:
        raise ConfigError(f"{stage} of {run.folder} has written no log yet; status {run.folder} says what it waits for")
    at: dict[Path, int] = collections.defaultdict(int)
    while True:
        status = run.status(stage)
        gone = status["state"] == "running" and status["job"] is None and not is_alive(status)  # its supervisor was killed
        ended = gone or status["state"] in ("done", "failed", "cancelled")
        for path in attempts(run, stage)[begin:]:
            text = path.read_bytes()[at[path]:]
            whole = text[:text.rfind(b"\n") + 1]
            at[path] += len(whole)
            yield from whole.decode(errors="replace").splitlines()
        if not follow or ended:
            return
        time.sleep(0.2)
