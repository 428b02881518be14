"""Checkpoints: complete or not there. ``<stage>/checkpoints/iter_0000100/<model>/`` is a megatron-core ``torch_dist`` folder.

A checkpoint is written beside its place, fsynced, renamed, and only then named by ``<stage>/latest``. It holds weights and
optimizer of every trained model and, in state.json, all else that the loop reads. No random state is kept: dropout is off
and every draw is seeded by (seed, iteration). The layout is free: any TP x PP x DP loads it.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from training.config import ConfigError, TrainerConfig
from training.model.bloom import Bloom
from training.step import Learner

# The first save of each rank would start a spawned manager process (seconds, 350 MB, left behind by a kill) only to pass
# results from a function to its caller in the same process.
filesystem_async._results_queue = queue.Queue()

# megatron-core's default sharding of the optimizer can't be loaded again; this one loads at any layout.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}


def folder(stage: str | Path, iteration: int) -> Path:
    return Path(stage) / "checkpoints" / f"iter_{iteration:07d}"


def iterations(stage: str | Path) -> list[int]:
    """Iterations saved in a stage's folder, ascending."""
    return sorted(int(path.name.removeprefix("iter_")) for path in (Path(stage) / "checkpoints").glob("iter_*"))


def latest(stage: str | Path) -> int | None:
    """The iteration that ``latest`` names, or None."""
    path = Path(stage) / "latest"
    return int(path.read_text()) if path.is_file() else None


def resolve(stage: str | Path, iteration: int = 0) -> Path:
    """Folder of a saved iteration (0 = the last). Raises ConfigError listing those present."""
    present = iterations(stage)
    wanted = iteration or latest(stage)
    if wanted not in present:
        have = ", ".join(map(str, present)) or "none"
        raise ConfigError(f"{stage}: checkpoint of iteration {'(last)' if wanted is None else wanted} is not there; present: {have}")
    return folder(stage, wanted)


def save(stage: str | Path, iteration: int, learners: dict[str, Learner], state: dict, trainer: TrainerConfig) -> None:
    """Write one checkpoint of all ``learners`` and ``state`` (JSON), then delete old ones. Collective.

    Kept are this one and the ``keep_checkpoints`` newest of those at a multiple of ``save_every``: one that a signal asked for
    pushes out none that a later stage may ask for by number.
    """
    target = folder(stage, iteration)
    aside = target.with_name(f".{target.name}.saving")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        for name in learners:
            (aside / name).mkdir(parents=True)
    dist.barrier()
    for name, learner in learners.items():
        weights = learner.model.sharded_state_dict()
        dist_checkpointing.save({"model": weights, "optimizer": _optimizer_state(learner, weights, is_loading=False)}, str(aside / name))
    dist.barrier()
    if dist.get_rank() == 0:
        steps = {name: learner.schedule.num_steps for name, learner in learners.items()}
        _write(aside / "state.json", json.dumps({"iteration": iteration, "optimizer_steps": steps, **state}, indent=1))
        publish(stage, aside, iteration)
        present = iterations(stage)
        kept = {iteration, *[number for number in present if number % trainer.save_every == 0][-trainer.keep_checkpoints :]}
        for old in set(present) - kept:
            _remove(folder(stage, old))
    dist.barrier()


def publish(stage: str | Path, aside: Path, iteration: int) -> None:
    """Make the complete checkpoint ``aside`` the stage's iteration, durably."""
    target = folder(stage, iteration)
    for path in sorted(aside.rglob("*")) + [aside]:
        _sync(path)
    if target.exists():
        _remove(target)
    os.replace(aside, target)
    _sync(target.parent)
    mark = Path(stage) / "latest"
    _write(mark.with_suffix(".new"), f"{iteration}\n")
    os.replace(mark.with_suffix(".new"), mark)
    _sync(mark.parent)


def load(path: Path, learners: dict[str, Learner]) -> dict:
    """Restore weights, optimizer and schedule of all ``learners`` from a checkpoint folder -> its state. Collective."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name, learner in learners.items():
        weights = learner.model.sharded_state_dict()
        wanted = {"model": weights, "optimizer": _optimizer_state(learner, weights, is_loading=True)}
        loaded = dist_checkpointing.load(wanted, str(path / name))
        learner.model.load_state_dict(loaded["model"])
        learner.optimizer.load_state_dict(loaded["optimizer"])
        learner.schedule.num_steps = state["optimizer_steps"][name]
    return state


def load_weights(path: Path, model: Bloom, fresh_head: int | None = None) -> None:
    """Weights alone, from a checkpoint's model folder (".../iter_0000100/model"), before a Learner is made. Collective.

    ``fresh_head``: seed of a new scalar head that the checkpoint does not hold.
    """
    wanted = model.sharded_state_dict()
    if fresh_head is not None:
        wanted = {key: value for key, value in wanted.items() if not key.startswith("score.")}
    # Nested, because the loaded dictionary also holds what the checkpoint has beside tensors (the optimizer's groups).
    loaded = dist_checkpointing.load({"model": wanted}, str(path))["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state") and not (fresh_head is not None and key.startswith("score."))]
    assert not missing and not unexpected, f"{path}: missing {missing}, unexpected {unexpected}"
    if fresh_head is not None and model.post_process:
        model.score.initialise(fresh_head)


def _optimizer_state(learner: Learner, weights: dict, is_loading: bool) -> dict:
    return learner.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill half way leaves nothing that counts as one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.deleting")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

