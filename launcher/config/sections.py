"""The run's configuration: defaults < recipe < file < ``--set``, merged once at submit. Standard
library only.

The sections ``model`` ... ``mtbench`` are the dataclasses of training, conversion and eval; the
section ``resources`` is defined here, a site's profile in launcher/config/profile.py.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from conversion.config import ConvertConfig, ExportConfig
from eval.config import MTBenchConfig
from launcher.config.addresses import refuse_secrets
from launcher.config.profile import Profile
from launcher.config.sbatch import SITE_OPTIONS, SbatchOptions
from training.config.data import DataConfig, ModelConfig
from training.config.schema import at_least, build
from training.config.trainers import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from training.errors import ConfigError, Mistakes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Resources(SbatchOptions):
    """What one stage requests: ``nodes x max(1, gpus_per_node)`` ranks, and where Slurm puts them.

    An option of sbatch that a stage leaves at "" is the profile's.
    """

    nodes: int = 1
    """Nodes that the stage runs on."""
    gpus_per_node: int = 1
    """GPUs, and ranks, of each node; 0 = one rank without a GPU."""
    minutes: int = 60
    """Time limit; a trainer that reaches it saves, is queued again and goes on."""
    cpus_per_gpu: int = 8
    """CPU cores of each rank."""
    spares: int = 0
    """Nodes asked for beyond ``nodes``: preflight leaves out those that are bad."""

    def __post_init__(self):
        at_least(self, 1, "nodes", "minutes", "cpus_per_gpu")
        at_least(self, 0, "gpus_per_node", "spares")
        self.check_sbatch_options()

    def at(self, profile: Profile) -> Profile:
        """The site as this stage's job sees it: the profile with the stage's own options of sbatch
        laid over."""
        own = {name: value for name in SITE_OPTIONS if (value := getattr(self, name))}
        return dataclasses.replace(profile, **own, options={**profile.options, **self.options})

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """Section ``resources``: one table a stage, e.g. ``resources.rlhf.nodes = 2``."""

    convert: Resources = Resources(gpus_per_node=0)
    sft: Resources = Resources()
    reward: Resources = Resources()
    rlhf: Resources = Resources()
    dpo: Resources = Resources()
    grpo: Resources = Resources()
    export: Resources = Resources(gpus_per_node=0)
    mtbench: Resources = Resources()

    def __post_init__(self):
        for name in ("convert", "export"):
            if getattr(self, name).ranks != 1:
                raise ValueError(f"{name}: this stage is one process; set nodes = 1 and gpus_per_node to 0 or 1")


SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "convert": ConvertConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "rlhf": PPOConfig,
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
    "export": ExportConfig,
    "mtbench": MTBenchConfig,
    "resources": StageResources,
}


def read_toml(path: Path) -> dict:
    """The file's tables; ConfigError names the file for a missing file or bad syntax."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a TOML file that you can read") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None


def read_recipe(name: str, profile: Profile | None = None) -> dict:
    """Tables of launcher/recipes/<name>.toml, with those of its layout for the profile's nodes, if
    it has one, laid over them.

    A layout fits a profile with as many GPUs a node, each with at least its memory; of several the
    one with most memory.
    """
    known = sorted(path.stem for path in RECIPES.glob("*.toml"))
    if name not in known:
        raise ConfigError(
            f"no recipe {name!r}{near(name, known)}; there are: {', '.join(known)} (another file goes to --config)"
        )
    recipe = read_toml(RECIPES / f"{name}.toml")
    fitting = [
        layout
        for layout in recipe.pop("layouts", {}).values()
        if profile
        and profile.gpus_per_node == layout["gpus_per_node"]
        and profile.gpu_memory_gb >= layout["gpu_memory_gb"]
    ]
    if not fitting:
        return recipe
    chosen = max(fitting, key=lambda layout: layout["gpu_memory_gb"])
    return merge(recipe, {section: values for section, values in chosen.items() if isinstance(values, dict)})


def parse_set(text: str) -> dict:
    """``sft.lr=1e-5`` -> {"sft": {"lr": 1e-5}}; the value is TOML, or a number without a 0 (``.9``,
    ``5.``), anything else is a string."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {text}: expected section.key=value, e.g. --set sft.lr=1e-5")
    number = re.fullmatch(r"\s*([+-]?)(\d*)\.(\d*)(e[+-]?\d+)?\s*", value, re.IGNORECASE)
    if number and (number[2] or number[3]):
        value = f"{number[1]}{number[2] or 0}.{number[3] or 0}{number[4] or ''}"
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    value_at_key = parsed["value"] if set(parsed) == {"value"} and not _dated(parsed["value"]) else value
    for part in reversed(parts):
        value_at_key = {part: value_at_key}
    return value_at_key


def _dated(value) -> bool:
    """Whether there is a date or time in a TOML value: no key of ours is one, and JSON has none."""
    if isinstance(value, dict | list):
        return any(map(_dated, value.values() if isinstance(value, dict) else value))
    return isinstance(value, datetime.date | datetime.time)


def merge(*layers: dict) -> dict:
    """Later layers win, table by table."""
    merged: dict = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and key in merged and isinstance(merged[key], dict)
            merged[key] = merge(merged[key], value) if both else value
    return merged


def check_sections(tables: dict, where: str) -> None:
    """ConfigError for unknown sections, a section that is no table, and for ``paths``, which only
    the launcher fills."""
    refuse_secrets(tables)  # first: other errors quote values
    mistakes, stages = Mistakes(), StageResources.__dataclass_fields__
    for section, values in tables.items():
        if section not in SECTIONS:
            key = next(iter(values), "") if isinstance(values, dict) else ""
            mistakes.add(
                f"{where}: no section {section!r}{near(section, SECTIONS, key)}; there are: {', '.join(SECTIONS)}"
            )
        elif not isinstance(values, dict):
            mistakes.add(
                f"{where}: {section} = {values!r}: expected a table, e.g. [{section}] or --set {section}.key=value"
            )
        elif "paths" in values:
            mistakes.add(
                f"{where}: {section}.paths is filled by the launcher; "
                "remove it (the folder follows from --runs and --name)"
            )
        elif section == "resources":
            for name in sorted(set(values) - set(stages)):
                hint = near(name, stages).replace("'", "'resources.", 1)
                mistakes.add(f"{where}: resources.{name}: no stage {name!r}{hint}; there are: {', '.join(stages)}")
    mistakes.raise_if_any()


def layered(recipe: str, files: list[Path], sets: list[str], profile: Profile | None = None) -> dict:
    """Recipe (in its layout for ``profile``) < files < --set, each checked for its sections; the
    dataclasses add defaults when built."""
    mistakes, layers = Mistakes(), []
    reads = [(lambda: read_recipe(recipe, profile), f"recipe {recipe}")]
    reads += [(functools.partial(read_toml, path), str(path)) for path in files]
    reads += [(functools.partial(parse_set, text), f"--set {text}") for text in sets]
    for read, where in reads:
        tables = mistakes.of(read)
        if tables is not None:
            layers.append((tables, where))
            mistakes.of(check_sections, tables, where)
    mistakes.raise_if_any()
    defaults = {section: {} for section in SECTIONS} | {"resources": dataclasses.asdict(StageResources())}
    return merge(defaults, *(tables for tables, _ in layers))


def build_plain(section: str, values: dict):
    """A section that has no paths: model, data or resources."""
    return build(SECTIONS[section], values, section)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf that differs."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = (side.get(key, "(absent)") for side in (old, new))
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines


METHODS = {
    "ppo": "rlhf",
    "rl": "rlhf",
    "rm": "reward",
    "reward_model": "reward",
    "finetune": "sft",
    "finetuning": "sft",
    "eval": "mtbench",
    "evaluate": "mtbench",
    "evaluation": "mtbench",
    "judge": "mtbench",
    "conversion": "convert",
}
"""What else people call a stage -> its name."""


def near(word: str, known, key: str = "") -> str:
    """ "; did you mean X?", by what a stage does, else by its spelling; "" where nothing is near.
    ``key`` of a section goes along."""
    known = list(known)
    by_method = METHODS.get(word.lower())
    match = [by_method] if by_method in known else difflib.get_close_matches(word, known, 1)
    return f"; did you mean {match[0] + (key and f'.{key}')!r}?" if match else ""
