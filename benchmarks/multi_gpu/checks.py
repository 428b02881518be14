"""The parts of benchmarks/multi_gpu/suite.py that compare: a layout's loss and gradients with those
of one GPU, a loaded checkpoint with the saved one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica

from benchmarks.device import PRECISION, synchronize
from benchmarks.multi_gpu.common import SHAPES, fill, length, local_part, micro_batches, print_row, rows, settings
from benchmarks.multi_gpu.plan import ON_PURPOSE
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
"""Relative tolerances in fp32, for another order of sums over 24 layers. The gradient's is of the
worst tensor (L2)."""
LONGEST = 1024
"""Tokens of a row whose gradients are compared. Jobs of other sizes and the compilation of later
jobs share the GPUs meanwhile."""
CHUNK = 2**26
"""Elements that are hashed or compared at once."""


def filled_learner(size: str, **values) -> Learner:
    config = settings(size, micro_batch_size=1, global_batch_size=ROWS, **values)
    model = build_model(SHAPES[size], config, "lm")
    fill(model, SHAPES[size])
    return Learner(model, config, config.lr, 1000, 0)


def gradients(size: str, layout: dict, folder: Path) -> None:
    """One step in fp32. A single rank writes its gradients to ``folder``. Several ranks compare
    theirs with these: each compares the elements whose sums it owns."""
    values = {"precision": "fp32", "seq_length": min(length(size), LONGEST), **layout}
    learner, shape = filled_learner(size, **values), SHAPES[size]
    config = settings(size, micro_batch_size=1, global_batch_size=ROWS, **values)
    optimizer = learner.optimizer
    optimizer.update = lambda norm: None
    batches = micro_batches(rows(size, ROWS, seq_length=config.seq_length), config)
    metrics = learner.step(batches, Objective(("loss",), sft.compute))
    names = {
        parameter: EMBEDDING if name == OUTPUT and shape.tied else name
        for name, parameter in named_weights(learner.model).items()
    }
    owned = {
        names[parameter]: (parameter, ranges["param"].start, ranges["param"].end)
        for parameter, ranges in optimizer._owned()
    }
    path, numbers = folder / f"{size}.pt", {name: metrics[name] for name in ("loss", "grad_norm")}
    if dist.get_world_size() == 1:
        one_gpu = {name: (parameter.main_grad * optimizer.scale).cpu() for name, (parameter, *_) in owned.items()}
        torch.save({"gradients": one_gpu, **numbers}, path)
        print_row(part="gradients", size=size, ok=True, **numbers)
        return
    reference = torch.load(path, mmap=True, weights_only=True)
    errors = gradient_errors(owned, reference["gradients"], optimizer.scale)
    worst = max(errors, key=errors.get)
    loss, norm = (abs(numbers[name] - reference[name]) / reference[name] for name in numbers)
    print_row(
        part="gradients",
        size=size,
        ok=loss <= LOSS and errors[worst] <= GRADIENT,
        loss_off=loss,
        norm_off=norm,
        worst=errors[worst],
        of=worst,
        median=sorted(errors.values())[len(errors) // 2],
    )


def gradient_errors(owned: dict[str, tuple], reference: dict[str, torch.Tensor], scale: float) -> dict[str, float]:
    """Relative L2 error of each tensor's gradient over all ranks.

    ``owned``: name -> (parameter, first and last element that this rank owns). ``reference``: the
    gradients of one GPU.
    """
    device = groups.device()
    sums = {name: torch.zeros(2, dtype=torch.double, device=device) for name in sorted(reference)}
    for name, (parameter, start, end) in owned.items():
        expected = local_part(reference[name].to(device), parameter).reshape(-1)[start:end]
        gradient = parameter.main_grad.view(-1)[start:end]
        # in chunks: 1b7's head in double takes 4 GB
        for chunk, exact in zip(gradient.split(CHUNK), expected.split(CHUNK), strict=True):
            exact = exact.double()
            sums[name] += torch.stack(((chunk * scale - exact).square().sum(), exact.square().sum()))
    total = torch.stack(list(sums.values()))
    dist.all_reduce(total)
    return dict(zip(sums, (total[:, 0] / total[:, 1]).sqrt().tolist(), strict=True))


def fails(size: str, layout: dict, folder: Path) -> None:
    """The last rank fails while the others wait for it in a collective;
    benchmarks/multi_gpu/suite.py says whether it could tell."""
    ones = torch.ones(1, device=groups.device())
    dist.all_reduce(ones)
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError(ON_PURPOSE)
    dist.all_reduce(ones)
    synchronize()


def saved(size: str, layout: dict, folder: Path) -> None:
    """Steps, then an asynchronous save of weights and optimizer during more steps. The fingerprints
    of what was saved are written to ``folder``."""
    values = {"optimizer_precision": PRECISION, "async_save": True, "save_every": 1, **layout}
    learner, config = (
        filled_learner(size, **values),
        settings(size, micro_batch_size=1, global_batch_size=ROWS, **values),
    )
    batches, objective = micro_batches(rows(size, ROWS), config), Objective(("loss",), sft.compute)
    learner.step(batches, objective)
    saver = Saver(StageFolder(folder / "saved"), {"model": learner}, config)
    saver.poll()  # pins host memory during the next steps
    began, steps = time.monotonic(), 0
    while highest([0.0 if saver.allocating is None or saver.allocating.done() else 1.0])[0]:
        learner.step(batches, objective)
        steps += 1
    pinned = time.monotonic() - began
    learner.step(batches, objective)
    prints, size_gb = fingerprints(learner), bytes_saved(learner) / 1e9
    saver.save(2, {})
    steps_meanwhile = 0
    while not (times := saver.poll()):
        learner.step(batches, objective)
        steps_meanwhile += 1
    if groups.is_main():
        (folder / "fingerprints.json").write_text(json.dumps(prints), encoding="utf-8")
    print_row(
        part="saved",
        size=size,
        ok=len(prints) > 0,
        gb=size_gb,
        seconds=times["save_s"],
        stall=times["save_stall_s"],
        tensors=len(prints),
        steps=steps_meanwhile,
        pinned_s=pinned,
        pinned_steps=steps,
    )


def loaded(size: str, layout: dict, folder: Path) -> None:
    """Load what ``saved`` wrote at another layout: every tensor must have the saved fingerprint."""
    learner = filled_learner(size, optimizer_precision=PRECISION, **layout)
    synchronize()
    began = time.monotonic()
    format.load(StageFolder(folder / "saved").resolve(), {"model": learner})
    synchronize()
    seconds, size_gb, prints = time.monotonic() - began, bytes_saved(learner) / 1e9, fingerprints(learner)
    expected = json.loads((folder / "fingerprints.json").read_text(encoding="utf-8"))
    wrong = [name for name in sorted({*prints, *expected}) if prints.get(name) != expected.get(name)]
    print_row(part="loaded", size=size, ok=not wrong, gb=size_gb, seconds=seconds, tensors=len(prints), wrong=wrong[:3])


def owned_tensors(learner: Learner) -> list[ShardedTensor]:
    """The tensors that this rank writes of a checkpoint."""
    state = nested_values(format.sharded(learner, is_loading=False))
    return [tensor for tensor in state if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)]


def bytes_saved(learner: Learner) -> float:
    total = torch.tensor(float(sum(tensor.data.nbytes for tensor in owned_tensors(learner))), dtype=torch.double)
    dist.all_reduce(total)
    return total.item()


def fingerprints(learner: Learner) -> dict[str, int]:
    """Tensor -> the sum, modulo 2^64, of its elements' bits times a hash of their places. Equal
    tensors have equal sums at every layout: each rank sums the elements that it owns."""
    sums: dict[str, int] = {}
    for tensor in owned_tensors(learner):
        sums[tensor.key] = sums.get(tensor.key, 0) + _hash(tensor)
    all_sums: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_sums, sums)
    keys = sorted({key for rank_sums in all_sums for key in rank_sums})
    return {key: sum(rank_sums.get(key, 0) for rank_sums in all_sums) % 2**64 for key in keys}


def _hash(tensor: ShardedTensor) -> int:
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
