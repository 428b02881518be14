"""What can be known to fail before anything is queued: configuration, layout, starting model, data, and the site's limits."""

from __future__ import annotations

from pathlib import Path

from launcher import cluster
from launcher.config import Profile, build_plain
from launcher.pipeline import STAGES, Stage, model_folder, stage_config
from training.config import ConfigError
from training.shape import BloomShape


def check(run: Path, tables: dict, stages: list[Stage], profile: Profile) -> None:
    """Raise ConfigError, with the fix, for the first mistake in what the selected stages would run with."""
    resources = build_plain("resources", tables["resources"])
    _data(tables)
    shape = _model_shape(run, tables)
    for stage in stages:
        asked = getattr(resources, stage.name)
        cluster.check_fits(profile, stage.name, asked)
        config = stage_config(run, tables, stage.name)
        if stage.trainer:
            try:
                config.data_parallel(asked.ranks)
            except ValueError as error:
                raise ConfigError(f"{stage.name}: {error} (resources.{stage.name}: {asked.nodes} nodes "
                                  f"x {asked.ranks_per_node} ranks)") from None
        if stage.trainer or stage.name == "convert":
            _layout(stage.name, shape, config.tensor_parallel, config.pipeline_parallel)
    _reward_iteration(stage_config(run, tables, "reward"))


def _data(tables: dict) -> None:
    source = build_plain("data", tables["data"]).source
    if source != "demo" and not Path(source).is_file():
        raise ConfigError(f'data.source = {source!r}: no such file; give a .jsonl or .jsonl.gz file, or "demo" for generated data')


def _model_shape(run: Path, tables: dict) -> dict[str, int]:
    """Heads, layers and feed-forward width of the starting model, from its config.json; for the demo from section model."""
    model = build_plain("model", tables["model"])
    if model.checkpoint == "demo":
        return {"heads": model.demo_heads, "layers": model.demo_layers, "feed-forward width": 4 * model.demo_hidden}
    folder = Path(model_folder(run, tables))
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ConfigError(f"model.checkpoint = {model.checkpoint!r}: {folder / name} does not exist; give the folder of a Hugging Face "
                              "BLOOM checkpoint (config.json, tokenizer.json, *.safetensors): --set model.checkpoint=FOLDER")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.checkpoint = {model.checkpoint!r}: no *.safetensors in it; weights in another format have to be saved "
                          "as safetensors first (save_pretrained of transformers does)")
    shape = BloomShape.read(folder)
    return {"heads": shape.heads, "layers": shape.layers, "feed-forward width": 4 * shape.hidden}


def _layout(stage: str, shape: dict[str, int], tensor_parallel: int, pipeline_parallel: int) -> None:
    for what, key, size in (("heads", "tensor_parallel", tensor_parallel), ("feed-forward width", "tensor_parallel", tensor_parallel),
                            ("layers", "pipeline_parallel", pipeline_parallel)):
        if shape[what] % size:
            fits = [number for number in range(1, size + 1) if shape[what] % number == 0]
            raise ConfigError(f"{stage}.{key} = {size}: the model's {shape[what]} {what} can't be divided by it; "
                              f"set --set {stage}.{key}={fits[-1]} (and resources.{stage} to match)")


def _reward_iteration(reward) -> None:
    """The reward iteration that rlhf asks for must be one that is saved and still kept when the stage ends."""
    wanted = reward.load_iteration
    saved = sorted({*range(reward.save_every, reward.iterations + 1, reward.save_every), reward.iterations})
    if wanted and wanted not in saved:
        raise ConfigError(f"reward.load_iteration = {wanted} is not saved: reward saves every {reward.save_every} iterations and the last, "
                          f"{reward.iterations}; use one of these, or 0 for the last")
    if wanted and wanted not in saved[-reward.keep_checkpoints:]:
        needed = len(saved) - saved.index(wanted)
        raise ConfigError(f"reward.load_iteration = {wanted} will be deleted before rlhf starts: the last {reward.keep_checkpoints} of "
                          f"{len(saved)} checkpoints are kept; set --set reward.keep_checkpoints={needed}")


def check_parents(stages: list[Stage], done: set[str]) -> None:
    """ConfigError when a selected stage needs one that is neither done nor selected before it."""
    coming = set(done)
    for stage in stages:
        missing = [parent for parent in stage.parents if parent not in coming]
        if missing:
            raise ConfigError(f"{stage.name} starts from {' and '.join(missing)}, not DONE in this run; "
                              f"submit full-pipeline --until {stage.name}, or {missing[0]} first (order: {' -> '.join(STAGES)})")
        coming.add(stage.name)
