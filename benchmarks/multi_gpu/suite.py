"""Do the layouts compute what one GPU does, and how fast? ``benchmarks/multi_gpu/run.sh N [--tiny]
[--out FOLDER] [--only REGEX ...]``

On N GPUs of one machine (a power of two), each part in processes of its own with a time limit:

    gradients  560m and 1b7, one step in fp32: loss and every tensor's gradient at TP, PP, DP, SP
               (sequence parallel) and VPP (interleaved), against one GPU's with nothing compiled
    sft        7b1, optimizer_precision "bf16", packed rows, loss on all tokens: tokens/s, MFU and
               memory of a step, and launcher/estimates/step_time.py's prediction of it. Rows and
               recompute are what it predicts as fastest among what fits by
               launcher/estimates/memory.py. Then the GB/s at which the weights move to each
               generation layout
    halves     sft on N/2 GPUs
    ppo        1b7 + 1b7 by the trainer, generation at another layout than training: its own phase
               times
    large      the same of 7b1 + 7b1, on 2 GPUs with offload = "all"; on fewer than 8 only if
               --parts names it
    fails      a rank fails while the others wait in a collective: its error is reported, and the
               job ends
    checkpoint 1b7 with its optimizer saved while training continues on N GPUs, loaded on N/2 at
               another layout, every tensor compared

Jobs whose numbers are compared share no GPU with others; the gradients' jobs do. Prints JSON lines
and tables, and writes both and each job's log to FOLDER. A line with "ok": false is a missed
tolerance. Exit code 1 then, and where a job failed. ``--tiny``: small shapes, also on the CPU,
where N ranks are N processes (gloo).
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import print_row
from benchmarks.learning.side_by_side import handling_signals
from benchmarks.multi_gpu.plan import MEMORY_GB_S, ON_PURPOSE, PARTS, Job, Waves, waves, with_prediction
from benchmarks.multi_gpu.tables import tables
from launcher.job.rank_log import Log
from launcher.job.ranks import LocalRanks
from launcher.slurm import network

RANK = Path(__file__).with_name("rank.py")
STACKS_S = 3
"""Seconds before the end of a job's time at which its ranks write their stacks into the log."""


class JobLog(Log):
    """A job's log. Rank 0's JSON lines are also collected in ``rows`` and printed."""

    def start(self, job: Job, first: int) -> JobLog:
        """``first``: the number of the first layout; ``current`` is that of the running one."""
        self.job, self.rows, self.current = job, [], first
        return self

    def write(self, tag, text: str) -> None:
        if tag == 0 and text.startswith("{"):
            row = json.loads(text)
            if "begins" in row:
                self.current = row["begins"]
            elif "ends" not in row:
                self.rows.append(
                    {"job": self.job.name, "gpus": len(self.job.gpus), "layout": self.job.layouts[self.current], **row}
                )
                print(json.dumps(self.rows[-1]), flush=True)
        super().write(tag, text)


class Running:
    """A job's processes, one attempt after the other. They import at once, and touch no GPU before
    ``run`` is called."""

    def __init__(self, job: Job, folder: Path, out: Path, cpu: bool):
        self.job, self.folder, self.out, self.cpu, self.rows = job, folder, out, cpu, []
        self.remaining, self.stopped = list(enumerate(job.layouts)), False
        self.free = threading.Event()
        """Set when the processes have left their GPUs."""
        self.start()

    def start(self) -> None:
        job, first = self.job, self.remaining[0][0]
        name = f"{job.name}.{first}".replace(" ", "_")
        environment = {variable: value for variable, value, _ in network.variables(network.named("one-machine"))} | {
            "NCCL_NVLS_ENABLE": "0",
            "CUDA_VISIBLE_DEVICES": "" if self.cpu else ",".join(map(str, job.gpus)),
            "TORCHINDUCTOR_COMPILE_THREADS": "12",
            "OMP_NUM_THREADS": "1" if self.cpu else "8",
        }
        arguments = {
            "part": job.part,
            "size": job.size,
            "name": name,
            "folder": str(self.folder),
            "layouts": self.remaining,
        }
        self.go = self.folder / f"{name}.go"
        self.log = JobLog(self.out / f"{job.name.replace(' ', '_')}.log").start(job, first)
        command = [sys.executable, "-u", str(RANK), json.dumps(arguments)]
        self.ranks = LocalRanks(self.log, command, len(job.gpus), environment)

    def run(self, end: float) -> None:
        """Run all layouts of the job until ``end`` (monotonic). A layout that fails ends the
        processes; new ones run the layouts after it."""
        job, began = self.job, time.monotonic()
        end = min(end, began + job.limit)
        while True:
            self.go.touch()
            self._wait(end)
            if not any(process.returncode for process in self.ranks.processes):
                self.free.set()  # the next jobs need not wait until all output is read
            ended = self.ranks.wait(lambda: None)
            self.rows += self.log.rows
            if not ended:
                break
            failed, late = self.log.current, time.monotonic() > end
            self._add_failure(failed, "its time was over" if late else ended[0].describe()[:500])
            self.remaining = [pair for pair in self.remaining if pair[0] > failed]
            if late or self.stopped or not self.remaining:
                break
            self.start()
        self.free.set()
        print_row(job=job.name, took_s=round(time.monotonic() - began, 1))

    def _wait(self, end: float) -> None:
        """Wait for the ranks. Shortly before ``end`` each writes its threads' stacks into the log;
        at ``end`` they are killed."""
        stacks_written = False
        while any(process.poll() is None for process in self.ranks.processes):
            self.ranks.kill_after_failure()
            if not stacks_written and time.monotonic() > end - STACKS_S:
                self.ranks.send_signal(signal.SIGUSR1)
                stacks_written = True
            if time.monotonic() > end:
                self.ranks.send_signal(signal.SIGKILL)
            time.sleep(0.05)

    def _add_failure(self, number: int, error: str) -> None:
        """Add and print the row of a layout that failed, for the part "fails" as it should."""
        job = self.job
        on_purpose = job.part == "fails" and ON_PURPOSE in error
        row = {
            "job": job.name,
            "part": job.part,
            "size": job.size,
            "gpus": len(job.gpus),
            "layout": job.layouts[number],
            **({"ok": True, "said": error} if on_purpose else {"error": error}),
        }
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def stop(self) -> None:
        """Kill the processes, and start no new ones."""
        self.stopped = True
        self.ranks.send_signal(signal.SIGKILL)


def detect_card() -> dict:
    """Name, number, memory and memory rate of the GPUs; without one, values for dry runs."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {"name": "CPU", "count": 0, "memory_gb": 85.5, "memory_gb_s": MEMORY_GB_S["H100"]}
    name, memory = lines[0].split(", ")
    rate = next((rate for part, rate in MEMORY_GB_S.items() if part in name), MEMORY_GB_S["H100"])
    return {"name": name, "count": len(lines), "memory_gb": float(memory) * 2**20 / 1e9, "memory_gb_s": rate}


def write(jobs: list[Running], card: dict, out: Path) -> list[dict]:
    """All rows so far; they are also written to multi_gpu.json."""
    rows = [with_prediction(row, card) for running in jobs for row in list(running.rows)]
    write_text(out / "multi_gpu.json", json.dumps({"card": card, "rows": rows}, indent=1))
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a file. A full disk is reported and ends nothing: the text is printed, too."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)


def expression(text: str) -> str:
    """argparse's type of a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def measure(
    options: argparse.Namespace, planned: Waves, card: dict, end: float, scratch: Path, started: list[Running]
) -> list[dict]:
    """Run all waves of jobs; their rows. Each job is added to ``started`` when its processes
    exist."""

    def start(wave: list[Job]) -> list[Running]:
        first = len(started)
        for job in wave:
            started.append(Running(job, scratch, options.out, card["count"] < options.gpus))
        return started[first:]

    jobs, threads = [], []
    wave = start(planned[0])
    while options.after and not options.after.exists():
        time.sleep(0.1)
    for following in [*planned[1:], []]:
        jobs += wave
        threads += [threading.Thread(target=running.run, args=(end,), daemon=True) for running in wave]
        for thread in threads[-len(wave) :]:
            thread.start()
        # the next wave imports while this one works, except on a few cores
        next_wave = start(following) if card["count"] else []
        for running in wave:
            running.free.wait()
        next_wave = next_wave or start(following)
        write(jobs, card, options.out)
        wave = next_wave
    for thread in threads:
        thread.join()
    return write(jobs, card, options.out)


def main() -> int:
    card = detect_card()
    options, planned = parse_arguments(card)
    end = time.monotonic() + options.limit
    options.out.mkdir(parents=True, exist_ok=True)
    print_row(card=card, gpus=options.gpus)
    started: list[Running] = []
    with (
        handling_signals(lambda number: sys.exit(128 + number)),
        tempfile.TemporaryDirectory(dir=options.scratch, ignore_cleanup_errors=True) as scratch,
    ):
        try:
            rows = measure(options, planned, card, end, Path(scratch), started)
        finally:  # after a signal: before the folder of up to 72 GB is deleted
            for running in started:
                running.stop()
    text = tables(rows, card)
    print(text)
    write_text(options.out / "multi_gpu.md", text)
    return int(any("error" in row or row.get("ok") is False for row in rows))


def parse_arguments(card: dict) -> tuple[argparse.Namespace, Waves]:
    """The options, and the waves of jobs that they select. Exits 2 where there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, but large only on 8 GPUs or more")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="REGEX",
        type=expression,
        help="only the jobs and layouts whose 'job, layout' matches one of these; the log and the tables have "
        "these names: --only 'sft 4, 0, TP 2 x PP 2' 'ppo 0'",
    )
    parser.add_argument("--out", type=Path, default=Path("multi_gpu"))
    parser.add_argument(
        "--scratch", type=Path, help="folder for checkpoints and gradients, deleted at the end (44 GB, with large 72)"
    )
    parser.add_argument("--limit", type=float, default=600, help="most seconds in all")
    parser.add_argument("--after", type=Path, help="a file: no GPU is touched before it exists")
    options = parser.parse_args()
    options.parts = options.parts or [part for part in PARTS if part != "large" or options.gpus >= 8]
    gpus = options.gpus
    if gpus < 1 or gpus & (gpus - 1) or not options.tiny and gpus > card["count"]:
        parser.error(
            f"--gpus {gpus}: expected a power of two, and at most the {card['count']} GPUs of this machine (or --tiny)"
        )
    planned = waves(gpus, options.tiny, card, options.parts, options.only)
    if not planned:
        parser.error(
            f"no job of --parts {' '.join(options.parts)} on {gpus} GPUs has a name that --only "
            f"{' '.join(options.only) or '(not given)'} matches; the tables and logs have the names"
        )
    return options, planned


if __name__ == "__main__":
    sys.exit(main())
