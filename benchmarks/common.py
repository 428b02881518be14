"""What all benchmarks share and needs no torch: the rows they print, the trainers' settings, and
parts in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

from training.config.trainers import Paths, SFTConfig

missed: list[dict] = []
"""The rows whose tolerance was missed."""


def print_row(ok: bool | None = None, **values: object) -> None:
    """Print one JSON line, floats with five digits. ``ok``: whether a tolerance was met."""
    row = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps(row if ok is None else {**row, "ok": ok}), flush=True)
    if ok is False:
        missed.append(row)


def sft_config(**values: object) -> SFTConfig:
    """The SFT trainer's settings without files."""
    return SFTConfig(paths=Paths("", "", "", "", ""), **{"warmup_iterations": 0, "lr": 1e-5} | values)


def run_part(script: str, arguments: list[str], limit_s: float, out: Path | None) -> tuple[list[dict], int]:
    """Run a part of a script in a process of its own; its rows and its exit code.

    Its output is passed on, and its JSON lines are also added to the file ``out``. It is killed
    after ``limit_s`` seconds.
    """
    rows = []
    with subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True) as process:
        alarm = threading.Timer(limit_s, process.kill)
        alarm.daemon = True  # an interrupt ends this process, too
        alarm.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                rows.append(json.loads(line))
                if out:
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(line)
        alarm.cancel()
    return rows, process.returncode
