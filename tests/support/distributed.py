"""Run a function on several gloo ranks: forked from this process, so that torch is imported once
for the whole suite."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from pathlib import Path

import torch

from training.distributed.groups import ranks


def _rank(rank: int, world: int, folder: str, layout: tuple[int, int], function, args) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    code = 1
    try:
        with ranks(*layout, seed=1, init_method=f"file://{folder}/store"):
            result = function(*args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
        code = 0
    except BaseException:  # noqa: BLE001 - whatever ends a rank is shown by the parent
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def run(
    function, tensor_parallel: int, pipeline_parallel: int, data_parallel: int, *args, timeout: float = 120
) -> list:
    """``function(*args)`` on every rank of the layout -> the ranks' results. The first failing
    rank's traceback fails the test."""
    world = tensor_parallel * pipeline_parallel * data_parallel
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        layout = (tensor_parallel, pipeline_parallel)
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, layout, function, args)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in processes):
            if time.monotonic() > end or any(process.exitcode for process in processes):
                break
            time.sleep(0.005)
        failed = any(process.exitcode != 0 for process in processes)
        time.sleep(0.2 if failed else 0)
        for process in processes:
            process.kill()
            process.join()
        errors = sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime)
        assert not errors, f"rank {errors[0].stem}:\n{errors[0].read_text()}"
        assert not failed, f"ranks ended with {[process.exitcode for process in processes]} within {timeout} s"
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world)]
