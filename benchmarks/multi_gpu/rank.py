"""One rank of a job of benchmarks/multi_gpu/suite.py. Its one argument is the job as JSON; rank 0
prints the results as JSON lines."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.multi_gpu import checks, speed
from benchmarks.multi_gpu.common import print_row
from training.distributed import groups

PARTS = {
    "gradients": checks.gradients,
    "saved": checks.saved,
    "loaded": checks.loaded,
    "fails": checks.fails,
    "warm": speed.warm,
    "sft": speed.steps,
    "prepared": speed.prepared,
    "ppo": speed.phases,
}


def main(job: dict) -> None:
    """All layouts of the job, each in process groups of its own."""
    folder = Path(job["folder"])
    print("all imported", flush=True)
    # imports are done; the GPUs are still another job's
    while not (folder / f"{job['name']}.go").exists():
        time.sleep(0.05)
    for number, layout in job["layouts"]:
        store = f"file://{folder}/{job['name']}.store.{number}"
        sizes = [layout.get(name, 1) for name in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline")]
        with groups.ranks(*sizes[:2], 1, store, sizes[2]):
            print_row(begins=number)
            PARTS[job["part"]](job["size"], layout, folder)
            print_row(ends=number)
            gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    faulthandler.enable()
    # the suite asks for the stacks before it ends a job whose time is over
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        main(json.loads(sys.argv[1]))
    except BaseException:  # noqa: BLE001 - printed; a clean exit would wait for ranks that hang in a collective
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
