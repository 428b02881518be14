"""How long does training stand still for a checkpoint? ``python benchmarks/training/saving.py
[--size 560m|1b7|small] [--folder DIR]``

One GPU (or the CPU with small), bf16 weights, fp32 masters and both moments, on one disk in one
run: torch.save of the same tensors into one file with fsync (the peer), our save with the loop
waiting, our save beside training steps, and a load with its checksums. Prints one JSON line each;
exit code 1 where a loaded element differs or the asynchronous save stalled for longer than the
waiting one took.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.distributed import groups
from training.models.bloom.table import shape as bloom
from training.sft import compute
from training.trainer.step import Learner, Objective, build_model

SHAPES = {
    "560m": bloom(24, 1024, 16, 250880, 1e-5),
    "1b7": bloom(24, 2048, 16, 250880, 1e-5),
    "small": bloom(4, 64, 4, 3000, 1e-5),
}


def timed(what: str, function, **more) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.monotonic()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    print(json.dumps({"what": what, "seconds": round(seconds, 3), **more}), flush=True)
    return seconds


def make(shape: Shape, config: SFTConfig) -> Learner:
    model = build_model(shape, config, "lm")
    generator = torch.Generator(device=groups.device()).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
    return Learner(model, config, 1e-5, 1000, 0)


def held(learner: Learner) -> dict[str, torch.Tensor]:
    state = format.sharded(learner, is_loading=False)
    both = {"model": state["model"], "state": state["optimizer"]["param_state"]}
    return {f"{kind}.{name}": tensor.data.detach() for kind, part in both.items() for name, tensor in part.items()}


def plain(learner: Learner, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save({name: tensor.cpu().clone() for name, tensor in held(learner).items()}, file)
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
    learner, objective = make(shape, config), Objective(("loss",), compute)
    length = 2048 if torch.cuda.is_available() else 32
    tokens = torch.randint(0, shape.vocab, (1, length), generator=torch.Generator().manual_seed(2))
    batch = {"tokens": tokens, "response_mask": torch.ones(1, length), "lengths": torch.tensor([length])}

    def step():
        learner.step([batch] * 8, objective)

    for _ in range(3):
        step()
    alone = timed("a training step", step)
    gigabytes = round(sum(tensor.nbytes for tensor in held(learner).values()) / 1e9, 3)
    timed("torch.save into one file, fsync", lambda: plain(learner, folder / "peer.pt"), gigabytes=gigabytes)
    (folder / "peer.pt").unlink()
    sync = timed(
        "our save, training waits",
        lambda: Saver(StageFolder(folder), {"model": learner}, waiting).save(1, {}),
        gigabytes=gigabytes,
    )
    saver, stalls = Saver(StageFolder(folder), {"model": learner}, config), []
    saver.poll()  # as after the first iteration: host memory is pinned beside training from now on
    timed(
        "eight training steps while host memory is pinned",
        lambda: [step() for _ in range(8)],
        alone=round(8 * alone, 3),
    )
    for number, which in ((2, "first"), (3, "second")):
        before = {name: tensor.cpu().clone() for name, tensor in held(learner).items()} if number == 3 else {}
        stalls.append(timed(f"our save, training goes on, stall of the {which}", partial(saver.save, number, {})))
        steps, began = 0, time.monotonic()
        while not (times := saver.poll()):
            step()
            steps += 1
        each = (time.monotonic() - began) / max(steps, 1)
        print(
            json.dumps(
                {
                    "what": "its steps meanwhile",
                    "steps": steps,
                    "seconds_a_step": round(each, 3),
                    "alone": round(alone, 3),
                    **{name: round(value, 3) for name, value in times.items()},
                }
            ),
            flush=True,
        )
    saver.wait()
    timed(
        "load, checksums included",
        lambda: format.load(StageFolder(folder).resolve(), {"model": learner}),
        gigabytes=gigabytes,
    )
    wrong = [name for name, tensor in held(learner).items() if not torch.equal(tensor.cpu(), before[name])]
    print(
        json.dumps(
            {"what": "elements as they were at the save", "ok": not wrong, "tensors": len(before), "wrong": wrong[:5]}
        )
    )
    return int(bool(wrong) or stalls[1] > sync)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="560m" if torch.cuda.is_available() else "small")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--optimizer-precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made, groups.ranks(1, 1, 1):
        code = run(SHAPES[arguments.size], Path(made), arguments.optimizer_precision)
    sys.exit(code)
