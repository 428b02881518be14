"""The report of one or several runs, made by ``python -m eval.report`` in a process of its own: it
needs what is never imported here."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launcher import run_module
from launcher.config import environment
from launcher.run.folder import Failed, Runs
from launcher.status import state
from launcher.status.row import reason_suffix
from launcher.status.terminal import say
from training.errors import ConfigError


def make(paths: Sequence[Path], output: Path | None) -> Path:
    """Path of the written report.html, of runs and of folders of ``python -m eval.mtbench``; a note
    for each run that isn't finished goes to stderr. ConfigError where a path is neither."""
    evaluations = [path for path in paths if (path / "results.json").is_file() and not (path / "config.json").is_file()]
    named = [path for path in paths if path not in evaluations]
    runs = Runs.open(named, Path("runs")) if named else []
    broken: list[str] = []
    statuses = state.statuses_of(runs, broken=broken)
    for line in broken:  # its files are damaged: the report names them
        say(f"its state can't be told: {line}; the report shows what there is", err=True)
    for status in statuses:
        row = next((row for row in status.stages if row.state != "done"), None)
        if row:
            stage = f"{row.stage} is {row.state_word}{reason_suffix(row)}"
            say(f"{status.run.folder} is not finished: {stage}; the report shows what there is", err=True)
    folders = [*(run.folder for run in runs), *evaluations]
    command = run_module.command("eval.report", *map(str, folders), *(["--output", str(output)] if output else []))
    done = subprocess.run(command, env=environment.outside(), capture_output=True, text=True, check=False)
    if done.returncode == os.EX_DATAERR:
        raise ConfigError(done.stderr.strip())
    if done.returncode:
        raise Failed(
            f"the report: exit code {done.returncode}: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return Path(done.stdout.strip().splitlines()[-1])
