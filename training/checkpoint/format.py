"""Checkpoints: complete or not there. ``<stage>/checkpoints/iter_0000100/<model>/`` is a
megatron-core ``torch_dist`` folder.

A checkpoint is written beside its place (training/checkpoint/writer.py), fsynced, renamed, and only
then named by ``<stage>/latest``. It holds weights and optimizer of every trained model, in
state.json all else that the loop reads, and in SHA256 the checksums, which every load checks first.
No random state is kept: dropout is off and every draw is seeded by (seed, iteration). The layout is
free: any TP x PP x DP loads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from training.checkpoint import checksums, safe_unpickle, strategies
from training.config.trainers import TrainerConfig
from training.errors import ConfigError, Damaged
from training.models import lora
from training.models.language_model import LanguageModel, model_chunks

_READ: dict[Path, tuple] = {}
"""Files whose content this process has found to be right, with what every write to them changes and
the digest: PPO's models come in pairs from one checkpoint."""


def verify(checkpoint: Path, below: str = "") -> None:
    """Raise Damaged, the same on every rank, unless the files of ``checkpoint`` (or of its
    sub-folder) have their checksums and no pickle among them names anything but tensors.
    Collective; each rank reads a part of the bytes, and none twice that has not been touched.
    """

    def bytes_agree() -> None:
        listed = checksums.select(checksums.read(checkpoint), below)
        mine = _share(checksums.present(checkpoint, listed), dist.get_rank(), dist.get_world_size())
        found = {name: (listed[name], *_touched(checkpoint / name)) for name in mine}
        checksums.compare(
            checkpoint, listed, [name for name in mine if _READ.get((checkpoint / name).absolute()) != found[name]]
        )
        _READ.update({(checkpoint / name).absolute(): what for name, what in found.items()})

    def pickles_are_harmless() -> None:
        if dist.get_rank() == 0:
            safe_unpickle.check(checkpoint / name for name in checksums.select(checksums.read(checkpoint), below))

    for test in (bytes_agree, pickles_are_harmless):
        problem = ""
        try:
            test()
        except Damaged as error:
            problem = str(error)
        except OSError as error:
            problem = f"{checkpoint} can't be read: {error}"
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if any(problems):
            raise Damaged(next(filter(None, problems)))


def _touched(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _share(sizes: dict[str, int], rank: int, ranks: int) -> list[str]:
    """The files that ``rank`` checks: largest first, each to the rank with the fewest bytes so
    far."""
    loads, mine = [0] * ranks, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        chosen = loads.index(min(loads))
        loads[chosen] += sizes[name]
        if chosen == rank:
            mine.append(name)
    return mine


class Trained(Protocol):
    """What a checkpoint holds of a learner (training/trainer/step.py): weights, optimizer,
    schedule."""

    model: LanguageModel
    optimizer: Any
    schedule: Any
    guard: Any


def sharded(learner: Trained, is_loading: bool) -> dict:
    """What a checkpoint folder holds of a learner, as megatron-core describes it: this rank's
    part."""
    weights = learner.model.sharded_state_dict()
    return {"model": weights, "optimizer": learner.optimizer.sharded_state_dict(weights, is_loading=is_loading)}


def load(path: Path, learners: dict[str, Trained]) -> dict:
    """Restore weights, optimizer and schedule of all ``learners`` from a checkpoint folder -> its
    state. Collective.

    Raises Damaged where a file is missing, truncated or changed, ConfigError where the
    configuration asks for other tensors.
    """
    verify(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name, learner in learners.items():
        _check_same(path, learner, state)
        loaded = strategies.load(sharded(learner, is_loading=True), path / name)
        learner.model.load_state_dict(loaded["model"])
        lora.check_scale(learner.model)
        learner.optimizer.load_state_dict(loaded["optimizer"])
        learner.schedule.num_steps = state["optimizer_steps"][name]
    return state


def made_with(trainer: TrainerConfig, model: LanguageModel) -> dict[str, int | str]:
    """What decides which tensors a checkpoint has to go on from, and what they mean: it can't be
    changed half way."""
    keys = {name: getattr(trainer, name) for name in ("lora_rank", "optimizer_precision", "precision")}
    return {"model_type": model_chunks(model)[0].shape.family, **keys}


def _check_same(path: Path, learner: Trained, state: dict) -> None:
    held = state.get("made_with", {})  # an earlier version's says nothing, or less
    for name, value in made_with(learner.guard.trainer, learner.model).items():
        if name in held and held[name] != value:
            raise ConfigError(
                f"{name} = {value!r}, but {path} was made with {name} = "
                f"{held[name]!r}; resume with that, or start the stage anew"
            )


def load_weights(path: Path, model: LanguageModel, fresh_head: int | None = None) -> None:
    """Weights alone, from a checkpoint's model folder (".../iter_0000100/model"), before a Learner
    is made. Collective.

    Adapters in it are merged into the weights; those of ``model`` begin anew. ``fresh_head``: seed
    of a new scalar head that the checkpoint does not hold. Raises Damaged as ``load`` does.
    """
    verify(path.parent, path.name)
    wanted = {key: value for key, value in model.sharded_state_dict().items() if lora.ADAPTER_PREFIX not in key}
    if fresh_head is not None:
        wanted = {key: value for key, value in wanted.items() if not _of_head(key)}
    # Nested, because the loaded dictionary also holds what the checkpoint has beside tensors (the
    # optimizer's groups).
    loaded = strategies.load({"model": wanted}, path)["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    missing = [
        key
        for key in missing
        if not key.endswith("_extra_state")
        and lora.ADAPTER_PREFIX not in key
        and not (fresh_head is not None and _of_head(key))
    ]
    if missing or unexpected:
        raise ConfigError(
            f"{path} holds another model than this one: missing {missing}, unexpected {unexpected}; "
            "start from a checkpoint of the model in config.json"
        )
    lora.absorb(strategies.SafeReader(path), model)
    lora.initialise(model)
    if fresh_head is not None and model.post_process:
        model.score.initialise(fresh_head)


def _of_head(key: str) -> bool:
    return key.startswith("score.") or ".score." in key  # also in a part of an interleaved pipeline
