"""What can be known to fail before anything is queued: configuration, layout, memory, inputs, disk, and the site's limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launcher import cluster, container, inputs, memory, storage, weights
from launcher.config import Profile, StageResources, build_plain
from launcher.pipeline import Graph, Stage, model_folder, stage_config
from training.config import RewardConfig, RolloutConfig
from training.data.config import ModelConfig
from training.hf_folder import file
from training.settings import ConfigError
from training.shape import Shape, check_language_model
from training.special_tokens import Said


@dataclass(frozen=True)
class Checked:
    """What the checks found out; ``plan`` shows it."""

    shape: Shape
    resources: StageResources
    estimates: dict[str, memory.Estimate]
    """Stage -> memory of one GPU; trainers only."""
    disk: dict[str, float]
    """Stage -> GB that it will have on disk."""
    room: storage.Room
    data: str
    """What the data is, in words."""
    warnings: list[str] = field(default_factory=list)


def check(run: Path, tables: dict, graph: Graph, stages: list[Stage], profile: Profile) -> Checked:
    """Raise ConfigError with every mistake in what the selected stages would run with, each with its fix."""
    found = Mistakes()
    model, data = build_plain("model", tables["model"]), build_plain("data", tables["data"])
    resources = build_plain("resources", tables["resources"])
    folder = Path(model_folder(run, tables))
    shape, weights_gb, notes = found.of(lambda: _model(model, folder, data.source)) or (None, 0.0, [])
    cut_to = lengths(run, tables, graph, stages)
    words, dropped = found.of(lambda: inputs.check_data(data, model if shape else None, cut_to)) or ("", [])
    if "reward" in graph:
        found.of(lambda: _reward_iteration(stage_config(run, tables, graph, "reward")))
    estimates, disk, warnings = {}, {}, [*notes]
    for stage in stages:
        asked, config = getattr(resources, stage.name), stage_config(run, tables, graph, stage.name)
        found.of(lambda: cluster.check_fits(profile, stage.name, asked))  # noqa: B023 - called at once
        if stage.trainer:
            divides = found.of(lambda: _data_parallel(stage.name, config, asked))  # noqa: B023
        if shape and (stage.trainer or stage.name == "convert"):
            laid_out = found.of(lambda: _layout(stage, shape, config))  # noqa: B023
        if stage.name == "mtbench":
            found.of(lambda: inputs.check_questions(config.questions, config.references))  # noqa: B023
            found.of(lambda: inputs.check_template(config.template, folder))  # noqa: B023
        if shape and stage.name == "mtbench":
            found.of(lambda: shape.check_length("mtbench.context_length", config.context_length))  # noqa: B023
        if shape and stage.trainer and divides and laid_out:
            made = estimates[stage.name] = memory.estimate(shape, config, asked.ranks)
            warnings.append(found.of(lambda: memory.check_host(stage.name, made, asked, profile)))  # noqa: B023
            if profile.gpu_memory_gb and asked.gpus_per_node and profile.device != "cpu":
                warnings.append(found.of(lambda: memory.check(stage.name, shape, config, asked, profile)))  # noqa: B023
        if shape:
            disk[stage.name] = _disk_gb(stage, config, shape, weights_gb)
    found.of(lambda: container.check_seen(profile, {"model.checkpoint": folder, "--runs": run}))
    there = found.of(lambda: storage.check(disk, run))
    found.raise_if_any()
    return Checked(shape, resources, estimates, disk, there, words, [*dropped, *(each for each in warnings if each)])


def lengths(run: Path, tables: dict, graph: Graph, stages: list[Stage]) -> dict[str, tuple[str, str, int]]:
    """Trainer -> (kind of its rows, the key of the length that they are cut to, that length)."""
    found = {}
    for stage in stages:
        if stage.trainer:
            config = stage_config(run, tables, graph, stage.name)
            key = "prompt_length" if isinstance(config, RolloutConfig) else "seq_length"
            found[stage.name] = (Path(config.paths.train).stem, key, getattr(config, key))
    return found


class Mistakes:
    """Collects ConfigErrors, so that a person sees all of them at once."""

    def __init__(self):
        self.messages: list[str] = []

    def of(self, check: Callable):
        """What ``check()`` returns, None where it raised."""
        try:
            return check()
        except ConfigError as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))
            return None

    def raise_if_any(self) -> None:
        if len(self.messages) > 1:
            raise ConfigError(f"{len(self.messages)} mistakes:\n" + "\n".join(f"{at}. {text}" for at, text in enumerate(self.messages, 1)))
        if self.messages:
            raise ConfigError(self.messages[0])


def _model(model: ModelConfig, folder: Path, source: str) -> tuple[Shape, float, list[str]]:
    """The starting model's shape, its weights' size in GB, and what a person should know of it."""
    if model.checkpoint == "demo":
        shape = Shape.demo(model)
        return shape, 4 * shape.parameters() / storage.GB, []
    for name in ("config.json", "tokenizer.json"):
        if not file(folder, name):
            if (folder / "tokenizer.model").is_file() and name == "tokenizer.json":
                raise ConfigError(f"model.checkpoint = {model.checkpoint!r}: only SentencePiece's tokenizer.model is there; make its "
                                  f"tokenizer.json once: python -c \"from transformers import LlamaTokenizer as T; "
                                  f"T.from_pretrained('{folder}').save_pretrained('{folder}')\"")
            raise ConfigError(f"model.checkpoint = {model.checkpoint!r}: {folder / name} does not exist; give the folder of a Hugging Face "
                              "checkpoint (config.json, tokenizer.json, weights): --set model.checkpoint=FOLDER")
    shape = Shape.read(folder)
    check_language_model(folder, shape)
    Said.read(folder, shape.vocab)
    size, notes = weights.check_checkpoint(folder, shape)
    return shape, size / storage.GB, [*notes, *inputs.check_tokenizer(folder, shape, source)]


def _data_parallel(stage: str, config, asked) -> int:
    try:
        return config.data_parallel(asked.ranks)
    except ValueError as error:
        raise ConfigError(f"{stage}: {error} (resources.{stage}: {asked.nodes} nodes x {asked.ranks_per_node} ranks)") from None


def _layout(stage: Stage, shape: Shape, config) -> bool:
    """True. Heads, layers and vocabulary are divided by TP and PP; the vocabulary is padded to fit."""
    try:
        virtual = config.virtual_pipeline if stage.trainer else 1
        shape.check_layout(config.tensor_parallel, config.pipeline_parallel, virtual)
        if stage.trainer:
            shape.check_length(config.LENGTH, config.longest_row)
        if isinstance(config, RolloutConfig) and config.generation_tensor_parallel:
            shape.check_tensor_parallel(config.generation_tensor_parallel, "generation_tensor_parallel")
    except ConfigError as error:
        raise ConfigError(f"{stage.name}.{error}; with --set {stage.name}.KEY=VALUE, and resources.{stage.name} to match") from None
    return True


def _disk_gb(stage: Stage, config, shape: Shape, weights_gb: float) -> float:
    """Most that a stage has on disk at once: kept checkpoints and the one being written, or the models that it exports."""
    if stage.trainer:
        return storage.checkpoints(config) * storage.checkpoint_gb(config, shape)
    models = len(config.paths.checkpoints) if stage.name == "export" else stage.name == "convert"
    return models * weights_gb


def _reward_iteration(reward: RewardConfig) -> None:
    """The reward iteration that rlhf asks for must be one that is saved and still kept when the stage ends."""
    wanted, saved = reward.load_iteration, storage.saves(reward)
    if not wanted:
        return
    number = storage.save_number(reward, wanted)
    if not number:
        raise ConfigError(f"reward.load_iteration = {wanted} is not saved: reward saves every {reward.save_every} "
                          f"iterations and the last, {reward.iterations}; use one of these, or 0 for the last")
    kept = reward.keep_every and wanted % reward.keep_every == 0
    if not kept and number <= saved - reward.keep_checkpoints:
        raise ConfigError(f"reward.load_iteration = {wanted} will be deleted before rlhf starts: the last "
                          f"{reward.keep_checkpoints} of {saved} checkpoints are kept; "
                          f"set --set reward.keep_checkpoints={saved - number + 1}")


def check_parents(graph: Graph, stages: list[Stage], done: set[str]) -> None:
    """ConfigError when a selected stage needs one that is neither done nor selected before it."""
    coming = set(done)
    for stage in stages:
        missing = [parent for parent in stage.parents if parent not in coming]
        if missing:
            raise ConfigError(f"{stage.name} starts from {' and '.join(missing)}, not DONE in this run; "
                              f"submit full-pipeline --until {stage.name}, or {missing[0]} first (order: {' -> '.join(graph)})")
        coming.add(stage.name)
