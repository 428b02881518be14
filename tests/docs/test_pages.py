"""The commands, keys and files that the pages name exist."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import click
import pytest

from launcher.cli import main as launcher
from launcher.config.profile import Profile
from launcher.config.sections import SECTIONS, Resources
from launcher.config.stages import ALL
from launcher.job.outcome import FAULTLESS_KINDS, REQUEUED_KINDS, OutcomeKind

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEY = re.compile(rf"(?<![\w.])({'|'.join(SECTIONS)})\.([a-z_]+)(?:\.([a-z_]+))?")
FILE = re.compile(r"`((?:launcher|training|conversion|eval|slurm|tests)/[\w/.-]+)`")
NOT_KEYS = {"jsonl", "json", "toml", "sbatch", "md", "py", "html"}


def commands(text: str) -> list[list[str]]:
    """The words of each ``python -m launcher ...`` in the page's blocks."""
    text = text.replace("\\\n", " ")
    lines = re.findall(r"^python -m launcher (.*)$", text, re.MULTILINE)
    return [line.split(" #")[0].split() for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    for words in commands(page.read_text(encoding="utf-8")):
        command = launcher.get_command(click.Context(launcher), words[0])
        assert command, words
        options = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= options, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page):
    for section, key, below in KEY.findall(page.read_text(encoding="utf-8")):
        if key in NOT_KEYS:
            continue
        names = {field.name for field in dataclasses.fields(SECTIONS[section])}
        assert key in names, (section, key)
        if section == "resources" and key in ALL and below:
            assert below in {field.name for field in dataclasses.fields(Resources)}, (key, below)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in FILE.findall(text):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m ((?:launcher|training|conversion|eval|tests)(?:\.\w+)*)", text):
        importlib.util.find_spec(module) or pytest.fail(module)


def test_every_key_of_a_profile_is_on_the_page_of_sites():
    text = (ROOT / "docs/guides/sites.md").read_text(encoding="utf-8")
    missing = [field.name for field in dataclasses.fields(Profile) if f"`{field.name}`" not in text]
    assert not set(missing) - {"name", "slurm", "machine", "container", "network_table"}, missing


def test_every_class_of_ending_is_in_its_table_of_the_page_of_requeues():
    text = (ROOT / "docs/operations/requeue.md").read_text(encoding="utf-8")
    again, _, act = text.partition("## Endings after which you must act")
    row = re.compile(r"^\| `([a-z ]+)` \|(?:.*\|)? (.*) \|$", re.MULTILINE)
    counted = dict(row.findall(again))
    assert set(counted) == {kind.value for kind in REQUEUED_KINDS}
    assert {name for name, counts in counted.items() if counts == "no"} == {kind.value for kind in FAULTLESS_KINDS}
    assert set(dict(row.findall(act))) == {kind.value for kind in OutcomeKind} - set(counted) - {"done"}
