"""The parts of benchmarks/multi_gpu/suite.py that compare: a layout's loss and gradients with one
GPU's, a checkpoint with what was saved."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica

from benchmarks.multi_gpu.common import SHAPES, fill, length, micro_batches, mine, rows, say, settings
from benchmarks.multi_gpu.plan import ON_PURPOSE
from benchmarks.training.train import CUDA, sync
from training import sft
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.shape import EMBEDDING, OUTPUT
from training.distributed import groups
from training.generation.weight_sync import named_weights
from training.metrics.phase_timer import highest
from training.trainer.step import Learner, Objective, build_model

ROWS = 8
LOSS, GRADIENT = 1e-6, 1e-4
"""Relative, fp32: what another order of sums may change over 24 layers; a gradient's is of the
worst tensor (L2)."""
STATE = "bf16" if CUDA else "fp32"
"""optimizer_precision."""
LONGEST = 1024
"""Tokens of a row whose gradients are compared: jobs of other sizes and the compilation of later
ones share the GPUs."""
CHUNK = 2**26
"""Elements that are hashed or compared at once."""


def learner(size: str, **values) -> Learner:
    config = settings(size, micro_batch_size=1, global_batch_size=ROWS, **values)
    model = build_model(SHAPES[size], config, "lm")
    fill(model, SHAPES[size])
    return Learner(model, config, config.lr, 1000, 0)


def gradients(size: str, layout: dict, folder: Path) -> None:
    """One step in fp32. One rank alone writes its gradients to ``folder``; others compare theirs,
    each rank the elements whose sums it owns, with the part of the whole tensor."""
    values = {"precision": "fp32", "seq_length": min(length(size), LONGEST), **layout}
    made, shape = learner(size, **values), SHAPES[size]
    config = settings(size, micro_batch_size=1, global_batch_size=ROWS, **values)
    optimizer = made.optimizer
    optimizer.update = lambda norm: None
    found = made.step(
        micro_batches(rows(size, ROWS, longest=config.seq_length), config), Objective(("loss",), sft.compute)
    )
    names = {
        parameter: EMBEDDING if name == OUTPUT and shape.tied else name
        for name, parameter in named_weights(made.model).items()
    }
    owned = {
        names[parameter]: (parameter, ranges["param"].start, ranges["param"].end)
        for parameter, ranges in optimizer._owned()
    }
    path, numbers = folder / f"{size}.pt", {name: found[name] for name in ("loss", "grad_norm")}
    if dist.get_world_size() == 1:
        torch.save(
            {
                "gradients": {
                    name: (parameter.main_grad * optimizer.scale).cpu() for name, (parameter, *_) in owned.items()
                },
                **numbers,
            },
            path,
        )
        say(part="gradients", size=size, ok=True, **numbers)
        return
    theirs = torch.load(path, mmap=True, weights_only=True)
    sums = {name: torch.zeros(2, dtype=torch.double, device=groups.device()) for name in sorted(theirs["gradients"])}
    for name, (parameter, start, end) in owned.items():
        expected = mine(theirs["gradients"][name].to(groups.device()), parameter).reshape(-1)[start:end]
        ours = parameter.main_grad.view(-1)[start:end]
        # whole in double: 4 GB a tensor of 1b7's head
        for our, their in zip(ours.split(CHUNK), expected.split(CHUNK), strict=True):
            whole = their.double()
            sums[name] += torch.stack(((our * optimizer.scale - whole).square().sum(), whole.square().sum()))
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    errors = dict(zip(sums, (total[:, 0] / total[:, 1]).sqrt().tolist(), strict=True))
    worst = max(errors, key=errors.get)
    loss, norm = (abs(numbers[name] - theirs[name]) / theirs[name] for name in numbers)
    say(
        part="gradients",
        size=size,
        ok=loss <= LOSS and errors[worst] <= GRADIENT,
        loss_off=loss,
        norm_off=norm,
        worst=errors[worst],
        of=worst,
        median=sorted(errors.values())[len(errors) // 2],
    )


def fails(size: str, layout: dict, folder: Path) -> None:
    """The last rank fails while the others wait for it in a collective;
    benchmarks/multi_gpu/suite.py says whether it could tell."""
    ones = torch.ones(1, device=groups.device())
    dist.all_reduce(ones)
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError(ON_PURPOSE)
    dist.all_reduce(ones)
    sync()


def saved(size: str, layout: dict, folder: Path) -> None:
    """Steps, then an asynchronous save of weights and optimizer beside others; what was saved is
    fingerprinted."""
    values = {"optimizer_precision": STATE, "async_save": True, "save_every": 1, **layout}
    made, config = learner(size, **values), settings(size, micro_batch_size=1, global_batch_size=ROWS, **values)
    batches, objective = micro_batches(rows(size, ROWS), config), Objective(("loss",), sft.compute)
    made.step(batches, objective)
    saver = Saver(StageFolder(folder / "saved"), {"model": made}, config)
    saver.poll()  # pins host memory beside the next steps
    began, steps = time.monotonic(), 0
    while highest([0.0 if saver.allocating is None or saver.allocating.done() else 1.0])[0]:
        made.step(batches, objective)
        steps += 1
    pinned = time.monotonic() - began
    made.step(batches, objective)
    prints, size_gb = fingerprints(made), bytes_saved(made) / 1e9
    saver.save(2, {})
    beside = 0
    while not (times := saver.poll()):
        made.step(batches, objective)
        beside += 1
    if groups.is_main():
        (folder / "fingerprints.json").write_text(json.dumps(prints), encoding="utf-8")
    say(
        part="saved",
        size=size,
        ok=len(prints) > 0,
        gb=size_gb,
        seconds=times["save_s"],
        stall=times["save_stall_s"],
        tensors=len(prints),
        steps=beside,
        pinned_s=pinned,
        pinned_steps=steps,
    )


def loaded(size: str, layout: dict, folder: Path) -> None:
    """What ``saved`` wrote, at another layout: every tensor's fingerprint is the saved one's."""
    made = learner(size, optimizer_precision=STATE, **layout)
    sync()
    began = time.monotonic()
    format.load(StageFolder(folder / "saved").resolve(), {"model": made})
    sync()
    seconds, size_gb, ours = time.monotonic() - began, bytes_saved(made) / 1e9, fingerprints(made)
    theirs = json.loads((folder / "fingerprints.json").read_text(encoding="utf-8"))
    wrong = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    say(part="loaded", size=size, ok=not wrong, gb=size_gb, seconds=seconds, tensors=len(ours), wrong=wrong[:3])


def owned_tensors(made: Learner) -> list[ShardedTensor]:
    """What this rank writes of a checkpoint."""
    state = nested_values(format.sharded(made, is_loading=False))
    return [tensor for tensor in state if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)]


def bytes_saved(made: Learner) -> float:
    total = torch.tensor(float(sum(tensor.data.nbytes for tensor in owned_tensors(made))), dtype=torch.double)
    dist.all_reduce(total)
    return total.item()


def fingerprints(made: Learner) -> dict[str, int]:
    """Of each whole tensor: the sum, modulo 2^64, of its elements' bits times a hash of their
    places. Equal for equal tensors, however they are divided: each rank sums what it owns."""
    found: dict[str, int] = {}
    for tensor in owned_tensors(made):
        found[tensor.key] = found.get(tensor.key, 0) + _hashed(tensor)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    keys = sorted({key for one in everyone for key in one})
    return {key: sum(one.get(key, 0) for one in everyone) % 2**64 for key in keys}


def _hashed(tensor: ShardedTensor) -> int:
    values = tensor.data.detach()
    offset = list(tensor.global_offset)
    # the axis of layers may be missing from the data
    sizes = [1] * (len(offset) - values.dim()) + list(values.shape)
    assert len(sizes) < 3 or len(sizes) == 3 and sizes[0] == 1, f"{tensor.key}: {sizes}"
    layer, (first_row, first_column) = (offset[0], offset[1:]) if len(sizes) == 3 else (0, [*offset, 0][:2])
    values = values.reshape(-1, sizes[-1] if len(sizes) > 1 else 1)
    whole_number = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    total = 0
    for start in range(0, values.size(0), max(CHUNK // values.size(1), 1)):
        piece = values[start : start + max(CHUNK // values.size(1), 1)].contiguous().view(whole_number).long()
        row = first_row + start + torch.arange(piece.size(0), device=piece.device)[:, None]
        column = first_column + torch.arange(piece.size(1), device=piece.device)[None]
        place = (layer * 0x9E3779B1 + 1) + row * 0x85EBCA6B + column * 0xC2B2AE35
        place = (place ^ (place >> 15)) * 0x27D4EB2F
        total += int((piece * (place ^ (place >> 13))).sum())
    return total % 2**64
