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
from training.files.special_tokens import Said

MOST_LAYERS = 1000


@dataclass(frozen=True)
class Checked:
    """What the checks found out; ``plan`` shows it."""

    shape: Shape | None
    """None where the starting model can't be read."""
    resources: StageResources
    estimates: dict[str, memory.Estimate]
    """Stage -> memory of one GPU; trainers only."""
    disk: dict[str, float]
    """Stage -> GB that it will have on disk."""
    room: storage.Room
    data: str
    """What the data is, in words; "" where that is a mistake."""
    warnings: list[str] = field(default_factory=list)
    work: dict[str, hours.Work] = field(default_factory=dict)
    """Stage -> what it takes on paper; trainers on sites whose machine is known."""
    mistakes: list[str] = field(default_factory=list)
    """What stands against the plan, where the caller wants to show it all the same."""


def check(
    run: Path, tables: dict, graph: Graph, stages: list[Stage], profile: Profile, tolerant: bool = False
) -> Checked:
    """Raise ConfigError with every mistake in what the selected stages would run with, each with
    its fix. ``tolerant``: return them
    with what can be known in spite of them."""
    found = Mistakes()
    model, data = build_plain("model", tables["model"]), build_plain("data", tables["data"])
    resources = build_plain("resources", tables["resources"])
    folder = Path(model_folder(run, tables))
    shape = found.of(lambda: _shape(model, folder))
    sized = found.of(lambda: _weights_gb(model, folder, shape, data.source)) if shape else None
    weights_gb, notes = sized or (None, [])
    if shape and shape.layers > MOST_LAYERS:  # nothing of such a size is estimated
        found.of(lambda: _too_deep(model, shape))
        shape = None
    cut_to = lengths(run, tables, graph, stages)
    words, dropped = found.of(lambda: inputs.check_data(data, model if sized else None, cut_to)) or ("", [])
    if "reward" in graph:
        found.of(lambda: _reward_iteration(stage_config(run, tables, graph, "reward")))
    estimates, disk, warnings, work = {}, {}, [*notes], {}
    for stage in stages:
        asked, config = getattr(resources, stage.name), stage_config(run, tables, graph, stage.name)
        found.of(lambda: sites.check_fits(profile, stage.name, asked))  # noqa: B023 - called at once
        if stage.trainer:
            divides = found.of(lambda: _data_parallel(stage.name, config, asked))  # noqa: B023
        if shape and (stage.trainer or stage.name == "convert"):
            laid_out = found.of(lambda: _layout(stage, shape, config))  # noqa: B023
        if stage.name == "mtbench":
            found.of(lambda: inputs.check_questions(config.questions, config.references))  # noqa: B023
            warnings.append(found.of(lambda: judge.check_judge(config, profile)))  # noqa: B023
            found.of(lambda: inputs.check_template(config.template, folder))  # noqa: B023
        if shape and stage.name == "mtbench":
            found.of(lambda: shape.check_length("mtbench.context_length", config.context_length))  # noqa: B023
            if profile.gpu_memory_gb and asked.gpus_per_node and profile.device != "cpu":
                warnings.append(found.of(lambda: memory.check_evaluation(shape, config, profile)))  # noqa: B023
        if shape and stage.trainer and divides and laid_out:
            made = estimates[stage.name] = memory.estimate(shape, config, asked.ranks)
            if takes := hours.work(stage.name, shape, config, asked, profile):
                work[stage.name] = takes
            warnings.append(found.of(lambda: memory.check_host(stage.name, made, asked, profile)))  # noqa: B023
            if profile.gpu_memory_gb and asked.gpus_per_node and profile.device != "cpu":
                warnings.append(found.of(lambda: memory.check(stage.name, shape, config, asked, profile)))  # noqa: B023
        if shape:
            disk[stage.name] = _disk_gb(stage, config, shape, weights_gb or 2 * shape.parameters() / storage.GB)
    found.of(lambda: container.check_seen(profile, {"model.checkpoint": folder, "--runs": run}))
    there = found.of(lambda: storage.check(disk, run)) or storage.room(run)
    if not tolerant:
        found.raise_if_any()
    said = [*dropped, *(each for each in warnings if each)]
    return Checked(shape, resources, estimates, disk, there, words, said, work, found.messages)


def lengths(run: Path, tables: dict, graph: Graph, stages: list[Stage]) -> dict[str, tuple[str, str, int]]:
    """Trainer -> (kind of its rows, the key of the length that they are cut to, that length)."""
    found = {}
    for stage in stages:
        if stage.trainer:
            config = stage_config(run, tables, graph, stage.name)
            key = "prompt_length" if isinstance(config, RolloutConfig) else "seq_length"
            found[stage.name] = (Path(config.paths.train).stem, key, getattr(config, key))
    return found


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
            f"model.checkpoint = {model.checkpoint!r}: {folder / 'tokenizer.json'} does not exist; "
            f"give the "
            "folder of a Hugging Face checkpoint (config.json, tokenizer.json, weights): "
            "--set model.checkpoint=FOLDER"
        )
    Said.read(folder, shape.vocab)
    size, notes = weights.check_checkpoint(folder, shape)
    return size / storage.GB, [*notes, *inputs.check_tokenizer(folder, shape, source)]


def _data_parallel(stage: str, config, asked) -> int:
    try:
        return config.data_parallel(asked.ranks)
    except ValueError as error:
        raise ConfigError(
            f"{stage}: {error} (resources.{stage}: {asked.nodes} nodes x {asked.ranks_per_node} ranks)"
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
    models = len(config.paths.checkpoints) if stage.name == "export" else stage.name == "convert"
    return models * weights_gb


def _reward_iteration(reward: RewardConfig) -> None:
    """The reward iteration that rlhf asks for must be one that is saved and still kept when the
    stage ends."""
    wanted, saved = reward.load_iteration, storage.saves(reward)
    if not wanted:
        return
    number = storage.save_number(reward, wanted)
    if not number:
        raise ConfigError(
            f"reward.load_iteration = {wanted} is not saved: reward saves every {reward.save_every} "
            f"iterations and the last, {reward.iterations}; use one of these, or 0 for the last"
        )
    kept = reward.keep_every and wanted % reward.keep_every == 0
    if not kept and number <= saved - reward.keep_checkpoints:
        raise ConfigError(
            f"reward.load_iteration = {wanted} will be deleted before rlhf starts: the last "
            f"{reward.keep_checkpoints} of {saved} checkpoints are kept; "
            f"set --set reward.keep_checkpoints={saved - number + 1}"
        )


def check_sources(run: Path, tables: dict) -> Mistakes:
    """Mistakes in the data and the starting model, as far as their sections say where these are."""
    found = Mistakes()
    place = {key: value for key, value in tables["data"].items() if key in ("source", "skip_bad_rows")}
    data = found.of(lambda: build_plain("data", place))
    model = found.of(lambda: build_plain("model", tables["model"]))
    if data:
        found.of(lambda: inputs.check_data(data, None, {}))
    if model:
        folder = Path(model_folder(run, tables))
        shape = found.of(lambda: _shape(model, folder))
        found.of(lambda: shape and _weights_gb(model, folder, shape, place.get("source", "demo")))
    return found


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
