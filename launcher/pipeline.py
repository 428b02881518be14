"""The chain as a graph: what each stage runs, reads and must leave behind. Pure: it knows no Slurm."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from launcher.config import SECTIONS, build_plain
from training.config import PrepareConfig
from training.settings import ConfigError, build

FULL = "full-pipeline"


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    """Run as ``python -m module <stage folder>/config.json``."""
    parents: tuple[str, ...]
    """Stages whose outputs this one reads."""
    outputs: tuple[str, ...]
    """Globs below the stage's folder, each with at least one file when it is done; {iteration} is the last checkpoint's folder."""
    trainer: bool = False
    """Several ranks, checkpoints with an iteration above 0."""
    key_numbers: tuple[str, ...] = ()
    """Metrics shown beside the progress."""

    @property
    def checkpoints(self) -> bool:
        return any("{iteration}" in pattern for pattern in self.outputs)


STAGES = {stage.name: stage for stage in (
    Stage("convert", "conversion.hf_to_megatron", (), ("checkpoints/{iteration}/model/*",)),
    Stage("sft", "training.sft", ("convert",), ("checkpoints/{iteration}/model/*",), True, ("loss", "heldout_loss")),
    Stage("reward", "training.reward", ("sft",), ("checkpoints/{iteration}/model/*",), True, ("loss", "heldout_accuracy")),
    Stage("rlhf", "training.ppo", ("sft", "reward"), ("checkpoints/{iteration}/policy/*", "checkpoints/{iteration}/value/*"), True,
          ("reward", "kl", "eos_rate")),
    Stage("export", "conversion.megatron_to_hf", ("sft", "rlhf"),
          ("sft/config.json", "sft/*.json", "sft/*.safetensors", "rlhf/config.json", "rlhf/*.json", "rlhf/*.safetensors",
           "*/*.json", "*/*.safetensors")),
    Stage("mtbench", "eval", ("export",), ("results.json", "table.md", "table.csv", "model_answer/*.jsonl", "../report.html")),
)}


def select(target: str, first: str | None, last: str | None) -> list[Stage]:
    """The stages of ``submit TARGET --from first --until last``, in order; ConfigError where that names none."""
    names = list(STAGES)
    if target != FULL:
        if first or last:
            raise ConfigError(f"--from and --until choose a part of {FULL}; {target} is a single stage: leave them out")
        return [STAGES[target]]
    start, end = names.index(first or names[0]), names.index(last or names[-1])
    if start > end:
        raise ConfigError(f"--from {first} comes after --until {last}; the order is {' -> '.join(names)}")
    return [STAGES[name] for name in names[start:end + 1]]


def remaining(stages: Collection[Stage], identities: dict[str, str], built_from: dict[str, dict[str, str]]) -> list[Stage]:
    """Stages that still have to run, in order.

    ``identities``: stage -> identity of its manifest, for those that have one; ``built_from``: stage -> the parents' identities that
    its manifest names. A stage is done when it has a manifest, its parents are done, and they are the ones it was built from.
    """
    done = set()
    for stage in STAGES.values():
        if stage.name in identities and all(
                parent in done and built_from[stage.name][parent] == identities[parent] for parent in stage.parents):
            done.add(stage.name)
    return [stage for stage in stages if stage.name not in done]


def model_folder(run: Path, tables: dict) -> str:
    """Hugging Face folder of the starting model."""
    checkpoint = build_plain("model", tables["model"]).checkpoint
    return str(run / "model") if checkpoint == "demo" else checkpoint


def prepare_config(run: Path, tables: dict) -> PrepareConfig:
    """What ``python -m training.data.prepare`` reads."""
    paths = {"output": str(run / "data"), "model": str(run / "model")}
    return build(PrepareConfig, {"paths": paths, "model": tables["model"], "data": tables["data"]}, "prepare")


def stage_config(run: Path, tables: dict, name: str):
    """The stage's own dataclass with its paths; raises ConfigError for a bad key or value in its section."""
    return build(SECTIONS[name], {**tables[name], "paths": _paths(run, tables, name)}, name)


def full_tables(run: Path, tables: dict) -> dict:
    """Every section with its defaults filled in, as plain tables without paths: what config.json of the run holds."""
    made = {}
    for section in SECTIONS:
        config = stage_config(run, tables, section) if section in STAGES else build_plain(section, tables[section])
        made[section] = {key: value for key, value in dataclasses.asdict(config).items() if key != "paths"}
    return made


def _paths(run: Path, tables: dict, name: str) -> dict:
    model, data = model_folder(run, tables), run / "data"
    own = {"output": str(run / name), "model": model}
    if name == "convert":
        return own
    if name == "sft":
        return {**own, "init": str(run / "convert"), "train": str(data / "sft.jsonl"), "heldout": str(data / "sft_heldout.jsonl")}
    if name == "reward":
        return {**own, "init": str(run / "sft"), "train": str(data / "reward.jsonl"), "heldout": str(data / "reward_heldout.jsonl")}
    if name == "rlhf":
        reward = stage_config(run, tables, "reward")
        return {**own, "init": str(run / "sft"), "train": str(data / "rlhf.jsonl"), "heldout": str(data / "heldout.jsonl"),
                "reward": str(run / "reward"), "reward_iteration": reward.load_iteration}
    models = ("sft", "rlhf")
    if name == "export":
        holders = {**{model: str(run / model) for model in models}, "reward": str(run / "reward"), "value": str(run / "rlhf")}
        return {**own, "checkpoints": holders, "reward_iteration": stage_config(run, tables, "reward").load_iteration}
    return {"output": str(run / name), "models": {model: str(run / "export" / model) for model in models},
            "heldout": str(data / "heldout.jsonl"), "stages": {stage: str(run / stage) for stage in ("sft", "reward", "rlhf")},
            "report": str(run / "report.html")}
