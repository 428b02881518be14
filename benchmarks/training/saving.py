"""How long does training stand still for a checkpoint? ``python benchmarks/training/saving.py
[--size 560m|1b7|small] [--folder DIR]``

One GPU (or the CPU with small), bf16 weights, fp32 masters and both moments, on one disk in one
run. It times torch.save of the same tensors into one file with fsync (the peer), our save while
training waits, our save while training continues, and a load with its checksums. Prints one JSON
line each. Exit code 1 where a loaded element differs, or where the asynchronous save stalled
training for longer than the waiting save took.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import print_row
from benchmarks.device import CUDA, seconds_of
from benchmarks.inputs import random_weights
from benchmarks.shapes import SHAPES
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.distributed import groups
from training.sft import compute
from training.trainer.step import Learner, Objective, build_model


def timed(what: str, function, **more) -> float:
    """Print a row with the seconds of ``function``, and return them."""
    seconds = seconds_of(function)
    print_row(what=what, seconds=round(seconds, 3), **more)
    return seconds


def random_learner(shape: Shape, config: SFTConfig) -> Learner:
    model = build_model(shape, config, "lm")
    random_weights(model, seed=1)
    return Learner(model, config, 1e-5, 1000, 0)


def saved_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint: weights and optimizer."""
    state = format.sharded(learner, is_loading=False)
    parts = {"model": state["model"], "state": state["optimizer"]["param_state"]}
    return {f"{kind}.{name}": tensor.data.detach() for kind, part in parts.items() for name, tensor in part.items()}


def torch_save(learner: Learner, path: Path) -> None:
    """The peer: all tensors in one file, on the disk."""
    with open(path, "wb") as file:
        torch.save({name: tensor.cpu().clone() for name, tensor in saved_tensors(learner).items()}, file)
        file.flush()
        os.fsync(file.fileno())


def run(shape: Shape, folder: Path, precision: str) -> int:
    config = SFTConfig(
        paths=Paths(str(folder), "", "", "", ""),
        micro_batch_size=1,
        global_batch_size=8,
        save_every=1,
        async_save=True,
        optimizer_precision=precision,
    )
    waiting = dataclasses.replace(config, async_save=False)
    learner, objective = random_learner(shape, config), Objective(("loss",), compute)
    length = 2048 if CUDA else 32
    tokens = torch.randint(0, shape.vocab, (1, length), generator=torch.Generator().manual_seed(2))
    batch = {"tokens": tokens, "response_mask": torch.ones(1, length), "lengths": torch.tensor([length])}

    def step():
        learner.step([batch] * 8, objective)

    for _ in range(3):
        step()
    step_s = timed("a training step", step)
    gigabytes = round(sum(tensor.nbytes for tensor in saved_tensors(learner).values()) / 1e9, 3)
    timed("torch.save into one file, fsync", lambda: torch_save(learner, folder / "peer.pt"), gigabytes=gigabytes)
    (folder / "peer.pt").unlink()
    sync = timed(
        "our save, training waits",
        lambda: Saver(StageFolder(folder), {"model": learner}, waiting).save(1, {}),
        gigabytes=gigabytes,
    )
    saver, stalls = Saver(StageFolder(folder), {"model": learner}, config), []
    saver.poll()  # like after the first iteration: from now on host memory is pinned while training runs
    timed(
        "eight training steps while host memory is pinned",
        lambda: [step() for _ in range(8)],
        alone=round(8 * step_s, 3),
    )
    for number, which in ((2, "first"), (3, "second")):
        before = {name: tensor.cpu().clone() for name, tensor in saved_tensors(learner).items()} if number == 3 else {}
        stalls.append(timed(f"our save, training goes on, stall of the {which}", partial(saver.save, number, {})))
        steps, began = 0, time.monotonic()
        while not (times := saver.poll()):
            step()
            steps += 1
        each = (time.monotonic() - began) / max(steps, 1)
        print_row(
            what="its steps meanwhile",
            steps=steps,
            seconds_a_step=round(each, 3),
            alone=round(step_s, 3),
            **{name: round(value, 3) for name, value in times.items()},
        )
    saver.wait()
    timed(
        "load, checksums included",
        lambda: format.load(StageFolder(folder).resolve(), {"model": learner}),
        gigabytes=gigabytes,
    )
    wrong = [name for name, tensor in saved_tensors(learner).items() if not torch.equal(tensor.cpu(), before[name])]
    print_row(not wrong, what="elements as they were at the save", tensors=len(before), wrong=wrong[:5])
    return int(bool(wrong) or stalls[1] > sync)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("560m", "1b7", "small"), default="560m" if CUDA else "small")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--optimizer-precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, groups.ranks(1, 1, 1):
        code = run(SHAPES[arguments.size], Path(name), arguments.optimizer_precision)
    sys.exit(code)
