"""Do the layouts compute what one GPU does, and how fast? ``benchmarks/multi_gpu.sh N [--tiny] [--out FOLDER] [--parts PART ...]``

On N GPUs of one machine (a power of two), each part in processes of its own with a time limit:

    gradients  560m and 1b7, one step in fp32: loss and every tensor's gradient at TP, PP, DP, SP (sequence parallel) and VPP
               (interleaved) against one GPU's with nothing compiled
    sft        7b1, optimizer_precision "bf16", packed rows, loss on all tokens: tokens/s, MFU and memory of a step on N/2 and N GPUs
               beside launcher/scaling.py's prediction; rows and recompute are what it finds fastest among what fits by
               launcher/memory.py; then the weights' way to each generation layout, in GB/s
    ppo        1b7 + 1b7 by the trainer, generation at another layout than training: its own phase times
    checkpoint 1b7 with its optimizer saved beside training on N GPUs, loaded on N/2 at another layout, every tensor compared

Numbers that are compared share no GPU with others; the gradients' jobs do. Prints JSON lines and tables, and writes both and each
job's log to FOLDER. A line with "ok": false is a missed tolerance; exit code 1 then, and where a job failed. ``--tiny``: small shapes,
on the CPU, too, where N ranks are N processes (gloo).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.multi_gpu_tables import tables
from launcher import nccl, scaling
from launcher.ranks import LocalRanks, Log
from training.config import Paths, SFTConfig
from training.families.bloom import shape as bloom
from training.settings import ConfigError

RANK = Path(__file__).with_name("multi_gpu_rank.py")
SHAPES = {"560m": bloom(24, 1024, 16, 250880, 1e-5), "1b7": bloom(24, 2048, 16, 250880, 1e-5), "7b1": bloom(30, 4096, 32, 250880, 1e-5),
          "tiny": bloom(8, 64, 4, 1000, 1e-5)}
MEMORY_GB_S = {"H100": 3350, "H200": 4800}
FITS = 0.9
"""Of a card's memory, by launcher/memory.py's estimate."""
PARTS = ("gradients", "sft", "ppo", "checkpoint")


@dataclass
class Job:
    """Processes on some GPUs, one layout after the other."""

    name: str
    part: str
    size: str
    gpus: list[int]
    layouts: list[dict]
    limit: float
    """Most seconds."""


def layout(tensor: int = 1, stages: int = 1, virtual: int = 1, sequence: bool | None = None, **values) -> dict:
    sequence = tensor > 1 if sequence is None else sequence
    return {"tensor_parallel": tensor, "pipeline_parallel": stages, "virtual_pipeline": virtual, "sequence_parallel": sequence, **values}


def divisions(gpus: int) -> list[dict]:
    """The ways to divide a model over ``gpus`` that are checked."""
    plain = {"compile": False}
    if gpus == 1:
        return [layout(**plain)]
    half = gpus // 2
    mixed = [layout(2, half, 2, **plain), layout(2, **plain), layout(1, 2, 2, **plain), layout(1, 2, **plain)] if half > 1 else []
    return [layout(gpus, **plain), layout(gpus, sequence=False, **plain), layout(1, gpus, **plain), layout(**plain),
            *(mixed or [layout(1, gpus, 2, **plain)]), layout(gpus), layout(2, half, sequence=False)]


def timed_layouts(size: str, gpus: int, card: dict) -> list[dict]:
    """Of SFT, with rows and recompute; those that don't fit are left out and said."""
    half = gpus // 2
    asked = [layout(gpus), layout(1, gpus), layout(gpus, compile=False), layout()] if gpus > 1 else [layout()]
    asked += [layout(2, half), layout(2, 1), layout(1, gpus, 2)] if half > 1 else []
    found = []
    for one in asked:
        made = fitting(size, one, gpus, card)
        if made is None:
            print(json.dumps({"part": "sft", "skipped": one, "why": f"no rows and recompute fit {card['memory_gb']:.0f} GB"}), flush=True)
        else:
            found.append(made)
    return found


def fitting(size: str, one: dict, gpus: int, card: dict) -> dict | None:
    """``one`` with the fastest rows and recompute that fit, by launcher/scaling.py; of equals more rows, and less recompute."""
    best = None
    for rows in (4, 2, 1):
        for recompute in ("none", "selective", "full"):
            values = {**one, "micro_batch_size": rows, "recompute": recompute, "global_batch_size": 8 * gpus}
            try:
                made = predicted(size, values, gpus, card)
            except ConfigError:
                continue
            if made.memory_gb <= FITS * card["memory_gb"] and (best is None or made.seconds < 0.99 * best[0]):
                best = made.seconds, values
    return best and best[1]


def predicted(size: str, values: dict, gpus: int, card: dict) -> scaling.Step:
    config = SFTConfig(paths=Paths("", "", "", "", ""), seq_length=128 if size == "tiny" else 2048, optimizer_precision="bf16", **values)
    machine = dataclasses.replace(scaling.MACHINES["one-machine"], memory_gb_s=card["memory_gb_s"])
    return scaling.step(SHAPES[size], config, gpus, machine, gpus)


def waves(gpus: int, tiny: bool, card: dict, parts: list[str]) -> list[list[Job]]:
    """Jobs that run at the same time, wave by wave."""
    small, middle, large = ("tiny",) * 3 if tiny else ("560m", "1b7", "7b1")
    everyone, half = list(range(gpus)), max(gpus // 2, 1)
    sizes = dict.fromkeys((small, middle))
    found = []
    if "gradients" in parts:
        found.append([Job(f"one GPU {size}", "gradients", size, [number % gpus], divisions(1), 100) for number, size in enumerate(sizes)])
    if "ppo" in parts:
        prepare = Job("prepare", "prepared", middle, [gpus - 1], [layout()], 100)
        found = [[*found[0], prepare]] if found and len(found[0]) < gpus else [*found, [prepare]]
    if "gradients" in parts and gpus > 1:
        found.append([Job(f"gradients {size}", "gradients", size, everyone, divisions(gpus), 120) for size in sizes])
    if "sft" in parts and gpus > 2:
        halves = timed_layouts(large, half, card)
        found.append([Job(f"sft {half} a", "sft", large, everyone[:half], halves[::2], 110),
                      Job(f"sft {half} b", "sft", large, everyone[half:], halves[1::2], 110)])
    if "sft" in parts:
        found.append([Job(f"sft {gpus}", "sft", large, everyone, timed_layouts(large, gpus, card), 180)])
    if "ppo" in parts:
        ways = [layout(2, max(half, 1), generation_tensor_parallel=1), layout(1, 2, generation_tensor_parallel=2)]
        found.append([Job("ppo", "ppo", middle, everyone, ways if gpus > 2 else ways[1:] if gpus == 2 else [layout()], 120)])
        if gpus == 2:
            found[-1][0].layouts.append(layout(2, generation_tensor_parallel=1))
    if "checkpoint" in parts:
        save = layout(2, 2) if gpus > 2 else layout(gpus)
        found.append([Job("save", "saved", middle, everyone, [save], 90)])
    if tiny and len(found) > 1:  # numbers mean nothing: what does not need another job's files runs at once
        found = [found[0], [job for wave in found[1:] for job in wave]]
    if "checkpoint" in parts:
        found.append([Job("load", "loaded", middle, everyone[:half], [layout(1, half)], 60)])
    return found


class Caught(Log):
    """A job's log; what rank 0 says as JSON is also kept and printed."""

    def start(self, job: Job, offset: int) -> Caught:
        self.job, self.rows, self.begun, self.offset = job, [], None, offset
        return self

    def write(self, tag, text: str) -> None:
        if tag == 0 and text.startswith("{"):
            row = json.loads(text)
            if "begins" in row:
                self.begun = row["begins"]
            elif "ends" not in row:
                self.rows.append({"job": self.job.name, "gpus": len(self.job.gpus), "layout": self.job.layouts[self.begun], **row})
                print(json.dumps(self.rows[-1]), flush=True)
        super().write(tag, text)


def run(job: Job, folder: Path, out: Path, end: float, cpu: bool, rows: list[dict]) -> None:
    """All layouts of a job; one that fails ends the processes, and the rest begin anew without it."""
    end, left = min(end, time.monotonic() + job.limit), list(enumerate(job.layouts))
    environment = {name: value for name, value, _ in nccl.NETWORKS["one-machine"]} | {
        "NCCL_NVLS_ENABLE": "0", "CUDA_VISIBLE_DEVICES": "" if cpu else ",".join(map(str, job.gpus)), "TORCHINDUCTOR_COMPILE_THREADS": "8",
        "OMP_NUM_THREADS": "1" if cpu else "8"}
    began = time.monotonic()
    while left:
        given = {"part": job.part, "size": job.size, "name": f"{job.name} {left[0][0]}", "folder": str(folder), "layouts": left}
        log = Caught(out / f"{job.name.replace(' ', '_')}.log").start(job, left[0][0])
        ranks = LocalRanks(log, [sys.executable, "-u", str(RANK), json.dumps(given)], len(job.gpus), environment)
        ended = ranks.wait(lambda ranks=ranks: ranks.pass_on(signal.SIGKILL) if time.monotonic() > end else None)
        rows += log.rows
        if not ended:
            break
        failed = left[0][0] if log.begun is None else log.begun
        why = "its time was over" if time.monotonic() > end else ended[0].words()
        rows.append({"job": job.name, "part": job.part, "size": job.size, "gpus": len(job.gpus), "layout": job.layouts[failed],
                     "error": why[:500]})
        print(json.dumps(rows[-1]), flush=True)
        left = [pair for pair in left if pair[0] > failed] if time.monotonic() < end else []
    print(json.dumps({"job": job.name, "took_s": round(time.monotonic() - began, 1)}), flush=True)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("multi_gpu"))
    parser.add_argument("--scratch", type=Path, help="where checkpoints and gradients go for a while (44 GB)")
    parser.add_argument("--limit", type=float, default=600, help="most seconds in all")
    asked = parser.parse_args()
    end, card = time.monotonic() + asked.limit, card_here()
    if asked.gpus & (asked.gpus - 1) or not asked.tiny and asked.gpus > card["count"]:
        parser.error(f"--gpus {asked.gpus}: expected a power of two, and no more than the {card['count']} GPUs here (or --tiny)")
    asked.out.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"card": card, "gpus": asked.gpus}), flush=True)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(dir=asked.scratch) as scratch:
        for wave in waves(asked.gpus, asked.tiny, card, asked.parts):
            arguments = (Path(scratch), asked.out, end, card["count"] < asked.gpus, rows)
            threads = [threading.Thread(target=run, args=(job, *arguments)) for job in wave]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for row in rows:
                if row["part"] == "sft" and "tokens_per_second" in row and "predicted_s" not in row:
                    made = predicted(row["size"], row["layout"], row["gpus"], card)
                    row.update(predicted_s=made.seconds, predicted_mfu=made.mfu, estimate_gb=made.memory_gb - 2.5)
            (asked.out / "multi_gpu.json").write_text(json.dumps({"card": card, "rows": rows}, indent=1), encoding="utf-8")
    text = tables(rows, card)
    (asked.out / "multi_gpu.md").write_text(text, encoding="utf-8")
    print(text)
    return int(any("error" in row or row.get("ok") is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
