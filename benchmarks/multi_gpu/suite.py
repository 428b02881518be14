"""Do the layouts compute what one GPU does, and how fast? ``benchmarks/multi_gpu/run.sh N [--tiny]
[--out FOLDER] [--only REGEX ...]``

On N GPUs of one machine (a power of two), each part in processes of its own with a time limit:

    gradients  560m and 1b7, one step in fp32: loss and every tensor's gradient at TP, PP, DP, SP
    (sequence parallel) and VPP
               (interleaved) against one GPU's with nothing compiled
    sft        7b1, optimizer_precision "bf16", packed rows, loss on all tokens: tokens/s, MFU and
               memory of a step beside
               launcher/estimates/step_time.py's prediction; rows and recompute are what it finds
               fastest among what fits by launcher/estimates/memory.py; then the weights' way to
               each generation layout, in GB/s
    halves     sft on N/2 GPUs
    ppo        1b7 + 1b7 by the trainer, generation at another layout than training: its own phase
               times
    large      the same of 7b1 + 7b1, on 2 GPUs with offload = "all"; on fewer than 8 only if
               --parts names it
    fails      a rank fails while the others wait in a collective: it says why, and the job ends
    checkpoint 1b7 with its optimizer saved beside training on N GPUs, loaded on N/2 at another
               layout, every tensor compared

Numbers that are compared share no GPU with others; the gradients' jobs do. Prints JSON lines and
tables, and writes both and each job's log to FOLDER. A line with "ok": false is a missed tolerance;
exit code 1 then, and where a job failed. ``--tiny``: small shapes, on the CPU, too, where N ranks
are N processes (gloo).
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

from benchmarks.learning.side_by_side import handling_signals
from benchmarks.multi_gpu.plan import MEMORY_GB_S, ON_PURPOSE, PARTS, Job, Waves, waves, with_prediction
from benchmarks.multi_gpu.tables import tables
from launcher.job.rank_log import Log
from launcher.job.ranks import LocalRanks
from launcher.slurm import network

RANK = Path(__file__).with_name("rank.py")
STACKS_S = 3
"""Seconds before a job's end at which it is asked where it is."""


class Caught(Log):
    """A job's log; what rank 0 says as JSON is also kept and printed."""

    def start(self, job: Job, first: int) -> Caught:
        self.job, self.rows, self.begun = job, [], first
        return self

    def write(self, tag, text: str) -> None:
        if tag == 0 and text.startswith("{"):
            row = json.loads(text)
            if "begins" in row:
                self.begun = row["begins"]
            elif "ends" not in row:
                self.rows.append(
                    {"job": self.job.name, "gpus": len(self.job.gpus), "layout": self.job.layouts[self.begun], **row}
                )
                print(json.dumps(self.rows[-1]), flush=True)
        super().write(tag, text)


class Running:
    """A job's processes, one attempt after the other. They import first, and touch no GPU before
    ``run`` is called."""

    def __init__(self, job: Job, folder: Path, out: Path, cpu: bool):
        self.job, self.folder, self.out, self.cpu, self.rows = job, folder, out, cpu, []
        self.left, self.free, self.stopped = list(enumerate(job.layouts)), threading.Event(), False
        self.start()

    def start(self) -> None:
        job, first = self.job, self.left[0][0]
        name = f"{job.name}.{first}".replace(" ", "_")
        environment = {variable: value for variable, value, _ in network.variables(network.named("one-machine"))} | {
            "NCCL_NVLS_ENABLE": "0",
            "CUDA_VISIBLE_DEVICES": "" if self.cpu else ",".join(map(str, job.gpus)),
            "TORCHINDUCTOR_COMPILE_THREADS": "12",
            "OMP_NUM_THREADS": "1" if self.cpu else "8",
        }
        given = {"part": job.part, "size": job.size, "name": name, "folder": str(self.folder), "layouts": self.left}
        self.go = self.folder / f"{name}.go"
        self.log = Caught(self.out / f"{job.name.replace(' ', '_')}.log").start(job, first)
        self.ranks = LocalRanks(
            self.log, [sys.executable, "-u", str(RANK), json.dumps(given)], len(job.gpus), environment
        )

    def run(self, end: float) -> None:
        """All layouts of the job; one that fails ends the processes, and the rest begin anew
        without it."""
        job, began = self.job, time.monotonic()
        end, asked = min(end, began + job.limit), False
        while True:
            self.go.touch()
            while any(process.poll() is None for process in self.ranks.processes):
                self.ranks.kill_after_failure()
                if not asked and time.monotonic() > end - STACKS_S:
                    # each rank writes its threads' stacks into the log and goes on
                    self.ranks.send_signal(signal.SIGUSR1)
                    asked = True
                if time.monotonic() > end:
                    self.ranks.send_signal(signal.SIGKILL)
                time.sleep(0.05)
            if not any(process.returncode for process in self.ranks.processes):
                self.free.set()  # the next jobs need not wait until all is read
            ended = self.ranks.wait(lambda: None)
            self.rows += self.log.rows
            if not ended:
                break
            failed, late = self.log.begun, time.monotonic() > end
            error = "its time was over" if late else ended[0].describe()[:500]
            told = {"ok": True, "said": error} if job.part == "fails" and ON_PURPOSE in error else {"error": error}
            self.rows.append(
                {
                    "job": job.name,
                    "part": job.part,
                    "size": job.size,
                    "gpus": len(job.gpus),
                    "layout": job.layouts[failed],
                    **told,
                }
            )
            print(json.dumps(self.rows[-1]), flush=True)
            self.left = [pair for pair in self.left if pair[0] > failed]
            if late or self.stopped or not self.left:
                break
            self.start()
        self.free.set()
        print(json.dumps({"job": job.name, "took_s": round(time.monotonic() - began, 1)}), flush=True)

    def stop(self) -> None:
        """Kill the processes, and begin none anew."""
        self.stopped = True
        self.ranks.send_signal(signal.SIGKILL)


def card_here() -> dict:
    """Name and memory of the GPUs, and their memory's rate; of none: a stand-in for dry runs."""
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {"name": "CPU", "count": 0, "memory_gb": 85.5, "memory_gb_s": MEMORY_GB_S["H100"]}
    name, memory = said[0].split(", ")
    rate = next((rate for part, rate in MEMORY_GB_S.items() if part in name), MEMORY_GB_S["H100"])
    return {"name": name, "count": len(said), "memory_gb": float(memory) * 2**20 / 1e9, "memory_gb_s": rate}


def write(every: list[Running], card: dict, out: Path) -> list[dict]:
    """All that is known by now, also to multi_gpu.json."""
    rows = [with_prediction(row, card) for running in every for row in list(running.rows)]
    keep(out / "multi_gpu.json", json.dumps({"card": card, "rows": rows}, indent=1))
    return rows


def keep(path: Path, text: str) -> None:
    """What can't be kept is still printed: a full disk ends nothing."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"{path} could not be written: {error}", file=sys.stderr, flush=True)


def expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def measure(
    asked: argparse.Namespace, planned: Waves, card: dict, end: float, scratch: Path, begun: list[Running]
) -> list[dict]:
    """Do all waves of jobs; what was found. ``begun``: gets each job when its processes are
    there."""

    def begin(wave: list[Job]) -> list[Running]:
        first = len(begun)
        for job in wave:
            begun.append(Running(job, scratch, asked.out, card["count"] < asked.gpus))
        return begun[first:]

    every, threads = [], []
    started = begin(planned[0])
    while asked.after and not asked.after.exists():
        time.sleep(0.1)
    for following in [*planned[1:], []]:
        every += started
        threads += [threading.Thread(target=running.run, args=(end,), daemon=True) for running in started]
        for thread in threads[-len(started) :]:
            thread.start()
        # imports beside the work before; not on a few cores
        ready = begin(following) if card["count"] else []
        for running in started:
            running.free.wait()
        ready = ready or begin(following)
        write(every, card, asked.out)
        started = ready
    for thread in threads:
        thread.join()
    return write(every, card, asked.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="without it all, but for large on fewer than 8 GPUs")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="REGEX",
        type=expression,
        help="of the parts' jobs and layouts those of whose 'job, layout', as in the log and the tables, one "
        "of these matches a part: --only 'sft 4, 0, TP 2 x PP 2' 'ppo 0'",
    )
    parser.add_argument("--out", type=Path, default=Path("multi_gpu"))
    parser.add_argument(
        "--scratch", type=Path, help="where checkpoints and gradients go for a while (44 GB, with large 72)"
    )
    parser.add_argument("--limit", type=float, default=600, help="most seconds in all")
    parser.add_argument("--after", type=Path, help="a file: no GPU is touched before it exists")
    asked = parser.parse_args()
    asked.parts = asked.parts or [part for part in PARTS if part != "large" or asked.gpus >= 8]
    end, card = time.monotonic() + asked.limit, card_here()
    if asked.gpus < 1 or asked.gpus & (asked.gpus - 1) or not asked.tiny and asked.gpus > card["count"]:
        parser.error(
            f"--gpus {asked.gpus}: expected a power of two, and no more than the {card['count']} GPUs here (or --tiny)"
        )
    planned = waves(asked.gpus, asked.tiny, card, asked.parts, asked.only)
    if not planned:
        parser.error(
            f"no job of --parts {' '.join(asked.parts)} on {asked.gpus} GPUs has a name that --only "
            f"{' '.join(asked.only) or '(not given)'} matches; names stand in the tables and logs"
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"card": card, "gpus": asked.gpus}), flush=True)
    begun: list[Running] = []
    with (
        handling_signals(lambda number: sys.exit(128 + number)),
        tempfile.TemporaryDirectory(dir=asked.scratch, ignore_cleanup_errors=True) as scratch,
    ):
        try:
            rows = measure(asked, planned, card, end, Path(scratch), begun)
        finally:  # after a signal: before the folder goes, and with it 72 GB
            for running in begun:
                running.stop()
    text = tables(rows, card)
    print(text)
    keep(asked.out / "multi_gpu.md", text)
    return int(any("error" in row or row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
