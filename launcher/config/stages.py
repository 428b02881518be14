"""The chain as a graph, one for each way to learn from preferences: what each stage runs, reads and
must leave behind. Pure: it knows no Slurm."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from eval.config import HH_TURN, MTBenchConfig
from launcher.config.sections import SECTIONS, build_plain
from training.config.data import PrepareConfig
from training.config.schema import build
from training.errors import ConfigError, Mistakes

FULL, PPO = "full-pipeline", "ppo"


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    """Run as ``python -m module <stage folder>/config.json``."""
    parents: tuple[str, ...]
    """Stages whose outputs this one reads."""
    outputs: tuple[str, ...]
    """Globs below the stage's folder, each with at least one file when it is done; {iteration} is
    the last checkpoint's folder."""
    trainer: bool = False
    """Several ranks, checkpoints with an iteration above 0."""
    key_numbers: tuple[str, ...] = ()
    """Metrics shown with the progress."""
    policy: bool = False
    """Its language model is exported and evaluated."""
    models: int | None = 0
    """Models that it writes without training; None: one for each of its ``paths.checkpoints``."""
    evaluation: bool = False
    """It asks questions and writes the report. It goes on from what it has after any change of its
    settings."""
    chosen_iteration: str = ""
    """Its setting that names an iteration from which a later stage starts: that iteration's files
    are outputs, too."""
    resumable: bool = True
    """On USR1 it ends with exit code 75, and started again it goes on from what it has done."""

    @property
    def checkpoints(self) -> bool:
        return any("{iteration}" in pattern for pattern in self.outputs)


Graph = dict[str, Stage]
"""The stages of a pipeline by name, parents before their children."""
MODEL = ("checkpoints/{iteration}/model/*",)


def graph(*trainers: Stage) -> Graph:
    """convert, the trainers, export of every policy among them, evaluation."""
    policies = tuple(stage.name for stage in trainers if stage.policy)
    files = [f"{name}/{file}" for name in policies for file in ("config.json", "*.json", "*.safetensors")]
    stages = (
        Stage("convert", "conversion.hf_to_megatron", (), MODEL, models=1),
        *trainers,
        Stage("export", "conversion.megatron_to_hf", policies, (*files, "*/*.json", "*/*.safetensors"), models=None),
        Stage(
            "mtbench",
            "eval",
            ("export",),
            ("results.json", "table.md", "table.csv", "model_answer/*.jsonl", "../report.html"),
            evaluation=True,
        ),
    )
    return {stage.name: stage for stage in stages}


SFT = Stage("sft", "training.sft", ("convert",), MODEL, True, ("loss", "heldout_loss"), policy=True)
REWARD = Stage(
    "reward",
    "training.reward",
    ("sft",),
    MODEL,
    True,
    ("loss", "heldout_accuracy"),
    chosen_iteration="load_iteration",
)
PIPELINES: dict[str, Graph] = {
    PPO: graph(
        SFT,
        REWARD,
        Stage(
            "rlhf",
            "training.ppo",
            ("sft", "reward"),
            ("checkpoints/{iteration}/policy/*", "checkpoints/{iteration}/value/*"),
            True,
            ("reward", "kl", "eos_rate"),
            policy=True,
        ),
    ),
    "grpo": graph(
        SFT,
        REWARD,
        Stage(
            "grpo",
            "training.grpo",
            ("sft", "reward"),
            ("checkpoints/{iteration}/policy/*",),
            True,
            ("reward", "kl", "eos_rate"),
            policy=True,
        ),
    ),
    "dpo": graph(SFT, Stage("dpo", "training.dpo", ("sft",), MODEL, True, ("loss", "heldout_accuracy"), policy=True)),
}
ALL: Graph = {name: stage for graph in reversed(PIPELINES.values()) for name, stage in graph.items()}
"""Every stage that there is; those that several pipelines have, as the first has them."""
NAMES = tuple(sorted(ALL, key=lambda name: (name in ("export", "mtbench"), [*PIPELINES[PPO], *ALL].index(name))))
"""Their names, roughly in order."""


def select(graph: Graph, target: str, first: str | None, last: str | None) -> list[Stage]:
    """The stages of ``submit TARGET --from first --until last``, in order; ConfigError where that
    names none of the pipeline."""
    names = list(graph)
    for name in (target, first, last):
        if name not in (None, FULL, *names):
            others = " or ".join(f"--pipeline {other}" for other, stages in PIPELINES.items() if name in stages)
            raise ConfigError(
                f"{name} is no stage of this pipeline ({' -> '.join(names)}); "
                f"it is one of {others}, in a run of its own"
            )
    if target != FULL:
        if first or last:
            raise ConfigError(f"--from and --until choose a part of {FULL}; {target} is a single stage: leave them out")
        return [graph[target]]
    start, end = names.index(first or names[0]), names.index(last or names[-1])
    if start > end:
        raise ConfigError(f"--from {first} comes after --until {last}; the order is {' -> '.join(names)}")
    return [graph[name] for name in names[start : end + 1]]


def remaining(
    graph: Graph, stages: Collection[Stage], identities: dict[str, str], built_from: dict[str, dict[str, str]]
) -> list[Stage]:
    """Those of ``stages`` that still have to run, in order.

    ``identities``: stage -> identity of its manifest, for those that have one; ``built_from``:
    stage -> the parents' identities that its manifest names. A stage is done when it has a
    manifest, its parents are done, and they are the ones it was built from.
    """
    done = set()
    for stage in graph.values():
        if stage.name in identities and all(
            parent in done and built_from[stage.name].get(parent) == identities[parent] for parent in stage.parents
        ):
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


def stage_config(run: Path, tables: dict, graph: Graph, name: str):
    """The stage's own dataclass with its paths; raises ConfigError for a bad key or value in its
    section."""
    values = {**tables[name], "paths": _paths(run, tables, graph, name)}
    if SECTIONS[name] is MTBenchConfig:
        values = _asked_as_trained(tables.get("data", {})) | values
    return build(SECTIONS[name], values, name)


def _asked_as_trained(data: dict) -> dict:
    """Settings of the evaluation that follow from the data's: a model is asked in the form that it
    was trained on."""
    as_text = {"template": HH_TURN} if data.get("template") == "hh" else {}
    return as_text | {"chat_template_kwargs": data.get("chat_template_kwargs", {})}


def sections(graph: Graph) -> list[str]:
    """Names of the sections that a run of this pipeline reads."""
    return [name for name in SECTIONS if name in graph or name not in ALL]


def full_tables(run: Path, tables: dict, graph: Graph) -> dict:
    """The run's sections with their defaults filled in, as plain tables without paths: what its
    config.json holds.

    Sections of other pipelines are checked, too, and left out.
    """
    full, mistakes = {}, Mistakes()
    for section in tables:
        if section in ALL:
            config = mistakes.of(stage_config, run, tables, graph, section)
        else:
            config = mistakes.of(build_plain, section, tables[section])
        if config is not None:
            full[section] = {key: value for key, value in dataclasses.asdict(config).items() if key != "paths"}
    mistakes.raise_if_any()
    full["resources"] = {name: full["resources"][name] for name in graph}
    return {section: full[section] for section in sections(graph)}


def _paths(run: Path, tables: dict, graph: Graph, name: str) -> dict:
    model, data = model_folder(run, tables), run / "data"
    own = {"output": str(run / name), "model": model}
    if name == "convert":
        return own
    if name == "sft":
        return {
            **own,
            "init": str(run / "convert"),
            "train": str(data / "sft.jsonl"),
            "heldout": str(data / "sft_heldout.jsonl"),
        }
    if name in ("reward", "dpo"):
        return {
            **own,
            "init": str(run / "sft"),
            "train": str(data / "reward.jsonl"),
            "heldout": str(data / "reward_heldout.jsonl"),
        }
    scored = name in ("rlhf", "grpo", "export") and "reward" in tables
    iteration = {"reward_iteration": stage_config(run, tables, graph, "reward").load_iteration if scored else 0}
    if name in ("rlhf", "grpo"):
        return {
            **own,
            "init": str(run / "sft"),
            "train": str(data / "rlhf.jsonl"),
            "heldout": str(data / "heldout.jsonl"),
            "reward": str(run / "reward"),
            **iteration,
        }
    models = [stage.name for stage in graph.values() if stage.policy]
    if name == "export":
        holders = {**dict(zip(models, models, strict=True)), "reward": "reward", "value": "rlhf"}
        return {
            **own,
            "checkpoints": {model: str(run / stage) for model, stage in holders.items() if stage in graph},
            **iteration,
        }
    trainers = [stage.name for stage in graph.values() if stage.trainer]
    return {
        "output": str(run / name),
        "models": {model: str(run / "export" / model) for model in models},
        "heldout": str(data / "heldout.jsonl"),
        "stages": {stage: str(run / stage) for stage in trainers},
        "report": str(run / "report.html"),
    }
