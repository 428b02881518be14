"""Conversion in bounded memory, against copying the same bytes: ``python
benchmarks/training/convert.py FOLDER [--layers 30] [--hidden 4096]``.

Writes a BLOOM of random bf16 weights (default: the shape of bloom-7b1, 14.1 GB; the disk needs
three times that). Then it times cp, Hugging Face -> Megatron, Megatron -> Hugging Face, Hugging
Face -> Megatron after a kill -9 in the middle, and cp again, each in processes of its own. Before
each step the files are synced and dropped from the page cache; each step ends with its files on
disk. Prints one JSON line a step: seconds (with the start of Python), GB/s, the ratio to the mean
of the two copies, and the largest RssAnon of any process, sampled every 20 ms. All results are
compared by sha256, and the folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from conversion import huggingface
from conversion.tensors import BLOCK, raw
from conversion.weights import entries, stored_name
from training.checkpoint import checksums
from training.config.shape import Shape

ROOT = Path(__file__).resolve().parents[2]


def make(folder: Path, layers: int, hidden: int, heads: int, vocab: int) -> int:
    """Write a Hugging Face folder with random weights (one random block, repeated at shifting
    offsets); the bytes of its weights."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "n_layer": layers,
        "hidden_size": hidden,
        "n_head": heads,
        "vocab_size": vocab,
        "layer_norm_epsilon": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape = Shape.read(folder)
    table = {name: size for entry in entries(shape) for name, size in entry.parts.items()}
    noise = (0.02 * torch.randn(BLOCK + 4096, generator=torch.Generator().manual_seed(0))).bfloat16()
    shards, total = huggingface.plan(table, torch.bfloat16, 2.0), 0
    for file, names in shards.items():
        stored = {stored_name(shape, name): table[name] for name in names}
        with open(folder / file, "wb") as out:
            out.write(huggingface.header(stored, torch.bfloat16))
            for number, name in enumerate(sorted(stored)):
                remaining = 2 * torch.Size(stored[name]).numel()
                total += remaining
                block = memoryview(raw(noise[number : number + BLOCK]).numpy())
                while remaining:
                    remaining -= out.write(block[: min(remaining, len(block))])
    (folder / "model.safetensors.index.json").write_text(huggingface.index(shape, shards, total))
    return total


def anonymous(process: psutil.Process) -> int:
    """RssAnon of one process, bytes (/proc/PID/status)."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def run(command: list[str], kill_after: Path | None = None) -> tuple[float, int]:
    """(seconds, largest RssAnon of any process) of a command. It is killed (-9) once the folder
    ``kill_after`` has half of the bytes."""
    started, most = time.monotonic(), 0
    process = psutil.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL if kill_after else None)
    while process.poll() is None:
        family = [process]
        if process.is_running():
            try:
                family += process.children(recursive=True)
            except psutil.NoSuchProcess:
                continue
        most = max(most, *map(anonymous, family))
        if kill_after and sum(path.stat().st_size for path in kill_after.rglob("*") if path.is_file()) > run.total / 2:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)
    if process.returncode and not kill_after:
        sys.exit(f"{command} ended with {process.returncode}")
    return time.monotonic() - started, most


def cold(folder: Path) -> None:
    """Write everything to disk, and drop the folder from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copy(hf: Path, to: Path) -> tuple[float, int]:
    """(seconds, largest RssAnon) of cp."""
    cold(hf.parent)
    measured = run(["sh", "-c", f"cp -r {hf} {to} && sync {to}/*"])
    shutil.rmtree(to)
    return measured


def measure(hf: Path, stage: Path, back: Path) -> None:
    rows: list[dict] = []

    def report(step: str, seconds: float, memory: int) -> None:
        speed = round(run.total / 1e9 / seconds, 2)
        rows.append({"step": step, "seconds": round(seconds, 1), "gb_per_s": speed, "rss_anon_mb": memory >> 20})
        print(json.dumps(rows[-1]), flush=True)

    def same(what: str, identical: bool) -> None:
        print(json.dumps({"step": what, "identical_files": identical}), flush=True)

    report("copy", *copy(hf, hf.with_name("copy")))
    to_megatron = [sys.executable, "-m", "conversion.hf_to_megatron", str(hf), str(stage)]
    cold(hf.parent)
    report("hf -> megatron", *run(to_megatron))
    checkpoint = stage / "checkpoints" / "iter_0000000"
    expected = checksums.read(checkpoint)
    cold(hf.parent)
    paths = [str(checkpoint / "model"), str(back), "--model", str(hf)]
    to_hf = [sys.executable, "-m", "conversion.megatron_to_hf", *paths]
    report("megatron -> hf", *run(to_hf))
    same(
        "round trip",
        all(checksums.digest(path) == checksums.digest(back / path.name) for path in hf.glob("*.safetensors")),
    )
    shutil.rmtree(back)
    shutil.rmtree(stage)
    run(to_megatron, kill_after=stage)
    written = sum(path.stat().st_size for path in stage.rglob("*.distcp"))
    cold(hf.parent)
    report(f"hf -> megatron, killed, {written / 1e9:.1f} GB kept, second start", *run(to_megatron))
    same("after the kill", checksums.read(checkpoint) == expected)
    shutil.rmtree(stage)
    report("copy again", *copy(hf, hf.with_name("copy")))
    base = (rows[0]["seconds"] + rows[-1]["seconds"]) / 2
    for row in rows:
        print(json.dumps({"step": row["step"], "ratio_to_copy": round(row["seconds"] / base, 2)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="on the disk to measure; must not exist")
    for name, number in (("layers", 30), ("hidden", 4096), ("heads", 32), ("vocab", 250880)):
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    hf, stage, back = (options.folder / name for name in ("hf", "stage", "back"))
    run.total = make(hf, options.layers, options.hidden, options.heads, options.vocab)
    print(json.dumps({"step": "made", "gigabytes": run.total / 1e9}), flush=True)
    try:
        measure(hf, stage, back)
    finally:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
