"""The settings in the commands of the pages build a run's configuration."""

import re
import shlex
from pathlib import Path

import pytest

from launcher.config import sections, stages

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = {"full-pipeline", *stages.ALL}


def commands() -> dict[str, list[str]]:
    """Page and command -> the arguments of each plan, submit and render with a target."""
    arguments_of = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ *python -m launcher ((?:plan|submit|render) [^#\n]*)", text, re.MULTILINE):
            arguments = shlex.split(line)
            if arguments[1] in TARGETS:
                arguments_of[f"{page.stem}: {' '.join(arguments)}"] = arguments
    return arguments_of


@pytest.mark.parametrize("arguments", commands().values(), ids=list(commands()))
def test_recipe_and_settings_build_every_stage(arguments):
    values = {"--recipe": ["bloom-tiny"], "--pipeline": ["ppo"], "--set": []}
    for name, value in zip(arguments, arguments[1:], strict=False):
        if name == "--set":
            values[name].append(value)
        elif name in values:
            values[name] = [value]
    tables = sections.layered(values["--recipe"][0], [], values["--set"])
    stages.full_tables(Path("runs/page"), tables, stages.PIPELINES[values["--pipeline"][0]])
