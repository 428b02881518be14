"""Names that a person types: what is near a wrong one, and their completion in bash, zsh and
fish."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "convoy", "_CONVOY_COMPLETE"


class Names(click.Choice):
    """One of several names; a mistake is answered with the nearest, or with the stage that does
    it."""

    def convert(self, value, parameter, context):
        try:
            return super().convert(value, parameter, context)
        except click.BadParameter as error:
            from launcher.config.sections import near

            error.message = error.message.rstrip(".") + near(str(value), self.choices)
            raise


def source(main: click.Group, shell: str) -> str:
    """The shell's own code, to be evaluated by it."""
    return get_completion_class(shell)(main, {}, PROGRAM, VARIABLE).source()


def runs(context: click.Context, _parameter, incomplete: str) -> list[CompletionItem]:
    """Names of runs and sweeps below --runs; what has a slash is a path."""
    if "/" in incomplete:
        return [CompletionItem(incomplete, type="dir")]
    below = Path(context.params.get("below") or "runs")
    names = {path.parent.name for name in ("config.json", "sweep.json") for path in below.glob(f"*/{name}")}
    return _begin(names, incomplete)


def recipes(_context, _parameter, incomplete: str) -> list[CompletionItem]:
    from launcher.config.sections import RECIPES

    return _begin((path.stem for path in RECIPES.glob("*.toml")), incomplete)


def profiles(_context, _parameter, incomplete: str) -> list[CompletionItem]:
    """Names in slurm/clusters, and files."""
    from launcher.slurm.sites import CLUSTERS

    items = _begin((path.stem for path in CLUSTERS.glob("*.toml")), incomplete)
    return items or [CompletionItem(incomplete, type="file")]


def keys(_context, _parameter, incomplete: str) -> list[CompletionItem]:
    """SECTION.KEY= of --set and --sweep."""
    from launcher.config.sections import SECTIONS, StageResources

    if "=" in incomplete:
        return []
    names = [
        f"{section}.{field.name}"
        for section, section_class in SECTIONS.items()
        if section != "resources"
        for field in dataclasses.fields(section_class)
        if field.name != "paths"
    ]
    stages = dataclasses.fields(StageResources)
    names += [
        f"resources.{stage.name}.{field.name}" for stage in stages for field in dataclasses.fields(type(stage.default))
    ]
    return _begin((f"{name}=" for name in names), incomplete)


def _begin(names, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]
