"""What a checkpoint holds, how it is checked, and how a learner or a model is loaded from it.

``<stage>/checkpoints/iter_0000100/<model>/`` is a megatron-core ``torch_dist`` folder: weights and
optimizer of one trained model. state.json holds all else that the loop reads, and SHA256 the
checksums, which every load checks first. No random state is kept: dropout is off and every draw is
seeded by (seed, iteration). The layout is free: any TP x PP x DP loads it.
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

_VERIFIED: dict[Path, list] = {}
"""Files whose content this process has verified -> sha256 and ``checksums.touched`` at that time.
PPO's models come in pairs from one checkpoint, which is then read once."""


def verify(checkpoint: Path, below: str = "") -> None:
    """Raise Damaged, the same on every rank, unless the files of ``checkpoint`` (or of its
    sub-folder) have their checksums and its pickles name nothing but tensors.

    A collective. Each rank reads a share of the bytes, and a file again only if it was touched.
    """
    for check in (_check_bytes, _check_pickles):
        problem = ""
        try:
            check(checkpoint, below)
        except Damaged as error:
            problem = str(error)
        except OSError as error:
            problem = f"{checkpoint} can't be read: {error}"
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if any(problems):
            raise Damaged(next(filter(None, problems)))


def _check_bytes(checkpoint: Path, below: str) -> None:
    """Compare this rank's share of the files with their checksums."""
    listed = checksums.select(checksums.read(checkpoint), below)
    share = _share(checksums.present(checkpoint, listed), dist.get_rank(), dist.get_world_size())
    paths = {name: (checkpoint / name).absolute() for name in share}
    states = {name: [listed[name], *checksums.touched(path)] for name, path in paths.items()}
    checksums.compare(checkpoint, listed, [name for name in share if _VERIFIED.get(paths[name]) != states[name]])
    _VERIFIED.update({paths[name]: state for name, state in states.items()})


def _check_pickles(checkpoint: Path, below: str) -> None:
    """Rank 0 checks that no pickle among the files would run code."""
    if dist.get_rank() == 0:
        safe_unpickle.check(checkpoint / name for name in checksums.select(checksums.read(checkpoint), below))


def _share(sizes: dict[str, int], rank: int, ranks: int) -> list[str]:
    """The files that ``rank`` checks: largest first, each to the rank with the fewest bytes so
    far."""
    loads, share = [0] * ranks, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        reader = loads.index(min(loads))
        loads[reader] += sizes[name]
        if reader == rank:
            share.append(name)
    return share


class Trained(Protocol):
    """What a checkpoint holds of a learner (training/trainer/step.py): weights, optimizer,
    schedule."""

    model: LanguageModel
    optimizer: Any
    schedule: Any
    guard: Any


def sharded(learner: Trained, is_loading: bool) -> dict:
    """This rank's part of a learner's weights and optimizer state, as megatron-core describes
    it."""
    weights = learner.model.sharded_state_dict()
    return {"model": weights, "optimizer": learner.optimizer.sharded_state_dict(weights, is_loading=is_loading)}


def load(path: Path, learners: dict[str, Trained]) -> dict:
    """Restore weights, optimizer and schedule of all ``learners`` from a checkpoint folder -> its
    state. A collective.

    Raises Damaged where a file is missing, truncated or changed, and ConfigError where the
    configuration needs other tensors.
    """
    verify(path)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name, learner in learners.items():
        _check_settings(path, learner, state)
        loaded = strategies.load(sharded(learner, is_loading=True), path / name)
        learner.model.load_state_dict(loaded["model"])
        lora.check_scale(learner.model)
        learner.optimizer.load_state_dict(loaded["optimizer"])
        learner.schedule.num_steps = state["optimizer_steps"][name]
    return state


def fixed_settings(trainer: TrainerConfig, model: LanguageModel) -> dict[str, int | str]:
    """Settings that decide which tensors a checkpoint has and what they mean. They can't be changed
    half way; state.json keeps them as "made_with"."""
    settings = {name: getattr(trainer, name) for name in ("lora_rank", "optimizer_precision", "precision")}
    return {"model_type": model_chunks(model)[0].shape.family, **settings}


def _check_settings(path: Path, learner: Trained, state: dict) -> None:
    saved = state.get("made_with", {})  # checkpoints of earlier commits have none, or fewer
    for name, value in fixed_settings(learner.guard.trainer, learner.model).items():
        if name in saved and saved[name] != value:
            raise ConfigError(
                f"{name} = {value!r}, but {path} was made with {name} = "
                f"{saved[name]!r}; resume with that, or start the stage from scratch"
            )


def load_weights(path: Path, model: LanguageModel, fresh_head: int | None = None) -> None:
    """Load weights alone, from a checkpoint's model folder (".../iter_0000100/model"). Do it before
    you construct a Learner. A collective.

    Adapters in the checkpoint are merged into the weights; those of ``model`` start from their
    initial values. ``fresh_head``: seed of a new scalar head that the checkpoint does not hold.
    Raises Damaged as ``load`` does, and ConfigError where it holds another model.
    """
    verify(path.parent, path.name)

    def is_fresh(key: str) -> bool:
        return lora.ADAPTER_PREFIX in key or (fresh_head is not None and _is_of_head(key))

    tensors = {key: value for key, value in model.sharded_state_dict().items() if not is_fresh(key)}
    # Nested, because the result also holds the checkpoint's other values (the optimizer's groups).
    loaded = strategies.load({"model": tensors}, path)["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    missing = [key for key in missing if not key.endswith("_extra_state") and not is_fresh(key)]
    if missing or unexpected:
        raise ConfigError(
            f"{path} holds another model than this one: missing {missing}, unexpected {unexpected}; "
            "start from a checkpoint of the model in config.json"
        )
    lora.absorb(strategies.SafeReader(path), model)
    lora.initialise(model)
    if fresh_head is not None and model.post_process:
        model.score.initialise(fresh_head)


def _is_of_head(key: str) -> bool:
    return key.startswith("score.") or ".score." in key  # also in a chunk of an interleaved pipeline
