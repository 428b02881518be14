"""How long a person waits for the launcher: ``python benchmarks/launcher.py [times.json]``, on a
Slurm of its own (slurm/dev/up).

Each command runs REPEATS times, and so does its peer: an empty Python, or Slurm's own ``squeue``.
``status`` shows a run of six queued stages, first alone in the queue, then among 5,000 held jobs.
Limits: --help .3 s, status .3 s plus Slurm's own answer and 1 s with 5,000 jobs, submit --dry-run
.5 s plus Slurm's own answer, logs of 500 ranks 5 s. Exits 1 where a median misses its limit.
Meaningful on an idle machine only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
REPEATS = 9
QUEUED = 5000
ARRAY = 1000
"""Elements of one array; MaxArraySize is 1001."""
RANKS = 500
LAUNCHER = [sys.executable, "-m", "launcher"]


def seconds(command: list[str], environment: dict[str, str], folder: Path) -> float:
    """Median wall clock of a command that must succeed."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(environment: dict[str, str], folder: Path) -> list[dict]:
    """Rows {"what", "seconds", "peer", "peer_seconds", "limit"}; the limit of status is .3 s plus
    the peer's, which is Slurm's answer."""

    def run(*command: str) -> None:
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)

    squeue, python = ["squeue", "-h", "-t", "all", "-o", "%A|%T|%r|%j|%k"], [sys.executable, "-c", "pass"]
    rows = []

    def row(what: str, command: list[str], peer: list[str], limit: float, plus_peer: bool = False) -> None:
        launcher_s, peer_s = seconds(command, environment, folder), seconds(peer, environment, folder)
        rows.append(
            {
                "what": what,
                "seconds": launcher_s,
                "peer": " ".join(peer[:1] + peer[1:2]),
                "peer_seconds": peer_s,
                "limit": limit + peer_s * plus_peer,
            }
        )

    row("--help", [*LAUNCHER, "--help"], python, 0.3)
    dry_run = [*LAUNCHER, "submit", "full-pipeline", "--dry-run", "--profile"]
    row("submit --dry-run, local", [*dry_run, "local"], python, 0.5)
    test_only = ["bash", "-c", "for stage in 1 2 3 4 5 6; do sbatch --test-only --wrap true; done"]
    row("submit --dry-run, Slurm", [*dry_run, "dev"], test_only, 0.5, plus_peer=True)
    run("scontrol", "update", "nodename=ALL", "state=drain", "reason=benchmark")
    run(*LAUNCHER, "submit", "full-pipeline", "--name", "queued")
    row("status, 6 jobs in the queue", [*LAUNCHER, "status", "queued"], squeue, 0.3, plus_peer=True)
    for _ in range(QUEUED // ARRAY):
        run("sbatch", "--hold", f"--array=0-{ARRAY - 1}", "--output=/dev/null", "--wrap", "true")
    row(f"status, {QUEUED:,} more", [*LAUNCHER, "status", "queued"], [*squeue, "-r"], 1.0)
    log = folder / "runs/queued/sft/logs/attempt_1.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(line(step, rank) for step in range(100) for rank in range(RANKS)), encoding="utf-8")
    row(f"logs, 100 lines of each of {RANKS} ranks", [*LAUNCHER, "logs", "queued", "sft"], ["cat", str(log)], 5.0)
    return rows


def line(step: int, rank: int) -> str:
    """A line of a rank's log, a second a step."""
    return f"2026-11-23T14:{step // 60:02d}:{step % 60 + rank / 600:06.3f} [{rank}] step {step}\n"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="convoy-") as folder:
        environment = {**os.environ, "CONVOY_DEV": f"{folder}/cluster", "PYTHONPATH": str(ROOT)}
        try:
            # not a pipe: the daemons would keep it open
            with open(f"{folder}/up.out", "w+", encoding="utf-8") as out:
                subprocess.run(
                    [ROOT / "slurm/dev/up"], env=environment, stdout=out, stderr=subprocess.STDOUT, check=True
                )
                out.seek(0)
                environment["SLURM_CONF"] = re.search(r"^export SLURM_CONF=(.*)$", out.read(), re.MULTILINE)[1]
            rows = measure(environment, Path(folder))
        finally:
            subprocess.run([ROOT / "slurm/dev/down", "--wipe"], env=environment, check=False)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}; medians of {REPEATS}\n"
    )
    print("| command | seconds | limit | peer | its seconds |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['what']} | {row['seconds']:.3f} | {row['limit']:.3f} | `{row['peer']}` | "
            f"{row['peer_seconds']:.3f} |"
        )
    if arguments:
        Path(arguments[0]).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return int(any(row["seconds"] > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
