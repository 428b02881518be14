"""What can be known to fail before anything is queued: configuration, layout, memory, inputs, disk,
and the site's limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from launcher.checks import disk as storage
from launcher.checks import inputs, judge, weights
from launcher.config.sections import Profile, StageResources, build_plain
from launcher.config.stages import Graph, Stage, model_folder, stage_config
from launcher.estimates import hours, memory
from launcher.slurm import container, sites
from training.config.data import ModelConfig
from training.config.shape import Shape, check_language_model
from training.config.trainers import RewardConfig, RolloutConfig
from training.errors import ConfigError, Mistakes
from training.files.hf_folder import file
from training.files.special_tokens import SpecialTokens

MOST_LAYERS = 1000


@dataclass(frozen=True)
class CheckResult:
    """What the checks found out; ``plan`` shows it."""

    shape: Shape | None
    """None where the starting model can't be read."""
    resources: StageResources
    estimates: dict[str, memory.Estimate]
    """Stage -> memory of one GPU; trainers only."""
    disk: dict[str, float]
    """Stage -> GB that it will have on disk."""
    free_space: storage.FreeSpace
    data: str
    """What the data is, in words; "" where that is a mistake."""
    warnings: list[str] = field(default_factory=list)
    work: dict[str, hours.Work] = field(default_factory=dict)
    """Stage -> what it takes on paper; trainers on sites whose machine is known."""
    mistakes: list[str] = field(default_factory=list)
    """What stands against the plan, where the caller wants to show it all the same."""


def check(
    run: Path, tables: dict, graph: Graph, stages: list[Stage], profile: Profile, tolerant: bool = False
) -> CheckResult:
    """Raise ConfigError with every mistake in what the selected stages would run with, each with
    its fix. ``tolerant``: return them
    with what can be known in spite of them."""
    mistakes = Mistakes()
    model, data = build_plain("model", tables["model"]), build_plain("data", tables["data"])
    resources = build_plain("resources", tables["resources"])
    folder = Path(model_folder(run, tables))
    shape = mistakes.of(_shape, model, folder)
    sized = mistakes.of(_weights_gb, model, folder, shape, data.source) if shape else None
    weights_gb, notes = sized or (None, [])
    if shape and shape.layers > MOST_LAYERS:  # nothing of such a size is estimated
        mistakes.of(_too_deep, model, shape)
        shape = None
    cut_to = lengths(run, tables, graph, stages)
    data_line, dropped = mistakes.of(inputs.check_data, data, model if sized else None, cut_to) or ("", [])
    if "reward" in graph:
        mistakes.of(lambda: _reward_iteration(stage_config(run, tables, graph, "reward")))
    estimates, disk, warnings, work = {}, {}, [*notes], {}
    for stage in stages:
        stage_resources, config = getattr(resources, stage.name), stage_config(run, tables, graph, stage.name)
        mistakes.of(sites.check_fits, profile, stage.name, stage_resources)
        if stage.trainer:
            divides = mistakes.of(_data_parallel, stage.name, config, stage_resources)
        if shape and (stage.trainer or stage.models == 1):
            laid_out = mistakes.of(_layout, stage, shape, config)
        if stage.evaluation:
            mistakes.of(inputs.check_questions, config.questions, config.references)
            warnings.append(mistakes.of(judge.check_judge, config, profile))
            mistakes.of(inputs.check_template, config.template, folder)
        if shape and stage.evaluation:
            mistakes.of(shape.check_length, "mtbench.context_length", config.context_length)
            if profile.gpu_memory_gb and stage_resources.gpus_per_node and profile.device != "cpu":
                warnings.append(mistakes.of(memory.check_evaluation, shape, config, profile))
        if shape and stage.trainer and divides and laid_out:
            estimate = estimates[stage.name] = memory.estimate(shape, config, stage_resources.ranks)
            if takes := hours.work(stage.name, shape, config, stage_resources, profile):
                work[stage.name] = takes
            warnings.append(mistakes.of(memory.check_host, stage.name, estimate, stage_resources, profile))
            if profile.gpu_memory_gb and stage_resources.gpus_per_node and profile.device != "cpu":
                warnings.append(mistakes.of(memory.check, stage.name, shape, config, stage_resources, profile))
        if shape:
            disk[stage.name] = _disk_gb(stage, config, shape, weights_gb or 2 * shape.parameters() / storage.GB)
    mistakes.of(container.check_seen, profile, {"model.checkpoint": folder, "--runs": run})
    free_space = mistakes.of(storage.check, disk, run) or storage.free_space(run)
    if not tolerant:
        mistakes.raise_if_any()
    lines = [*dropped, *(each for each in warnings if each)]
    return CheckResult(shape, resources, estimates, disk, free_space, data_line, lines, work, mistakes.messages)


def lengths(run: Path, tables: dict, graph: Graph, stages: list[Stage]) -> dict[str, tuple[str, str, int]]:
    """Trainer -> (kind of its rows, the key of the length that they are cut to, that length)."""
    lengths_by_stage = {}
    for stage in stages:
        if stage.trainer:
            config = stage_config(run, tables, graph, stage.name)
            key = "prompt_length" if isinstance(config, RolloutConfig) else "seq_length"
            lengths_by_stage[stage.name] = (Path(config.paths.train).stem, key, getattr(config, key))
    return lengths_by_stage


def _shape(model: ModelConfig, folder: Path) -> Shape:
    """The starting model's shape, from its config.json alone."""
    if model.checkpoint == "demo":
        return Shape.demo(model)
    if not file(folder, "config.json"):
        raise ConfigError(
            f"model.checkpoint = {model.checkpoint!r}: {folder / 'config.json'} does not exist; give the "
            "folder of a Hugging Face checkpoint (config.json, tokenizer.json, weights): "
            "--set model.checkpoint=FOLDER; its config.json alone suffices for plan's memory and hours"
        )
    shape = Shape.read(folder)
    check_language_model(folder, shape)
    return shape


def _too_deep(model: ModelConfig, shape: Shape) -> None:
    raise ConfigError(
        f"model.checkpoint = {model.checkpoint!r} has {shape.layers} layers; expected at most {MOST_LAYERS}"
    )


def _weights_gb(model: ModelConfig, folder: Path, shape: Shape, source: str) -> tuple[float, list[str]]:
    """Size of the starting model's weights in GB, and what a person should know of it;
    ConfigError where they, or the tokenizer,
    are not there or not whole."""
    if model.checkpoint == "demo":
        return 4 * shape.parameters() / storage.GB, []
    if not file(folder, "tokenizer.json"):
        if (folder / "tokenizer.model").is_file():
            raise ConfigError(
                f"model.checkpoint = {model.checkpoint!r}: only SentencePiece's tokenizer.model is "
                f"there; make its "
                f'tokenizer.json once: python -c "from transformers import LlamaTokenizer as T; '
                f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        raise ConfigError(
            f"model.checkpoint = {model.checkpoint!r}: {folder / 'tokenizer.json'} does not exist; give the folder "
            "of a Hugging Face checkpoint (config.json, tokenizer.json, weights): --set model.checkpoint=FOLDER"
        )
    SpecialTokens.read(folder, shape.vocab)
    size, notes = weights.check_checkpoint(folder, shape)
    return size / storage.GB, [*notes, *inputs.check_tokenizer(folder, shape, source)]


def _data_parallel(stage: str, config, stage_resources) -> int:
    try:
        return config.data_parallel(stage_resources.ranks)
    except ValueError as error:
        raise ConfigError(
            f"{stage}: {error} (resources.{stage}: {stage_resources.nodes} nodes x "
            f"{stage_resources.ranks_per_node} ranks)"
        ) from None


def _layout(stage: Stage, shape: Shape, config) -> bool:
    """True. Heads, layers and vocabulary are divided by TP and PP; the vocabulary is padded to
    fit."""
    try:
        virtual = config.virtual_pipeline if stage.trainer else 1
        shape.check_layout(config.tensor_parallel, config.pipeline_parallel, virtual)
        if stage.trainer:
            shape.check_length(config.LENGTH, config.longest_row)
        if isinstance(config, RolloutConfig) and config.generation_tensor_parallel:
            shape.check_tensor_parallel(config.generation_tensor_parallel, "generation_tensor_parallel")
    except ConfigError as error:
        raise ConfigError(
            f"{stage.name}.{error}; with --set {stage.name}.KEY=VALUE, and resources.{stage.name} to match"
        ) from None
    return True


def _disk_gb(stage: Stage, config, shape: Shape, weights_gb: float) -> float:
    """Most that a stage has on disk at once: kept checkpoints and the one being written, or the
    models that it exports."""
    if stage.trainer:
        return storage.checkpoints(config) * storage.checkpoint_gb(config, shape)
    models = len(config.paths.checkpoints) if stage.models is None else stage.models
    return models * weights_gb


def _reward_iteration(reward: RewardConfig) -> None:
    """The reward iteration that rlhf asks for must be one that is saved and still kept when the
    stage ends."""
    iteration, saved = reward.load_iteration, storage.saves(reward)
    if not iteration:
        return
    number = storage.save_number(reward, iteration)
    if not number:
        raise ConfigError(
            f"reward.load_iteration = {iteration} is not saved: reward saves every {reward.save_every} "
            f"iterations and the last, {reward.iterations}; use one of these, or 0 for the last"
        )
    is_kept = reward.keep_every and iteration % reward.keep_every == 0
    if not is_kept and number <= saved - reward.keep_checkpoints:
        raise ConfigError(
            f"reward.load_iteration = {iteration} will be deleted before rlhf starts: the last "
            f"{reward.keep_checkpoints} of {saved} checkpoints are kept; "
            f"set --set reward.keep_checkpoints={saved - number + 1}"
        )


def check_sources(run: Path, tables: dict) -> Mistakes:
    """Mistakes in the data and the starting model, as far as their sections say where these are."""
    mistakes = Mistakes()
    place = {key: value for key, value in tables["data"].items() if key in ("source", "skip_bad_rows")}
    data = mistakes.of(build_plain, "data", place)
    model = mistakes.of(build_plain, "model", tables["model"])
    if data:
        mistakes.of(inputs.check_data, data, None, {})
    if model:
        folder = Path(model_folder(run, tables))
        shape = mistakes.of(_shape, model, folder)
        mistakes.of(lambda: shape and _weights_gb(model, folder, shape, place.get("source", "demo")))
    return mistakes


def check_parents(graph: Graph, stages: list[Stage], done: set[str]) -> None:
    """ConfigError when a selected stage needs one that is neither done nor selected before it."""
    coming = set(done)
    for stage in stages:
        missing = [parent for parent in stage.parents if parent not in coming]
        if missing:
            raise ConfigError(
                f"{stage.name} starts from {' and '.join(missing)}, not DONE in this run; "
                f"submit full-pipeline --until {stage.name}, or {missing[0]} first (order: {' -> '.join(graph)})"
            )
        coming.add(stage.name)
