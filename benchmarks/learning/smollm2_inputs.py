"""The rows that benchmarks/learning/learns_smollm2.py trains on, and the checks before it starts: a
typing mistake costs no hour of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.learning.launch import settings_text
from benchmarks.learning.side_by_side import Work
from benchmarks.learning.smollm2_settings import HELDOUT, HELDOUT_MAX
from eval.files.jsonl import dump
from launcher.config.sections import check_sections, layered, near, parse_set
from launcher.config.stages import PIPELINES, PPO, full_tables
from launcher.run.folder import Busy, lock, this_process
from training.config.data import DataConfig
from training.data import formats
from training.data.rows import Row
from training.data.split import HeldOut
from training.errors import ConfigError, DataError

RECIPE = "smollm2-135m"
FIXED_SECTIONS = {
    "data": "HH_FILE gives its rows, and what is held out of them is the study's",
    "model": "it is --model",
    "mtbench": "the study's evaluation is not the launcher's",
}
"""Section -> why --set can't change it."""
SIDES = {"base": 0, "judge": 1, "full": None}
"""File of rows -> the half of the training prompts whose comparisons it has; None: all of them."""


def data_config(source: str) -> DataConfig:
    """Anthropic's file, and how many of its prompts are held out."""
    return DataConfig(source=source, heldout=HELDOUT, heldout_max=HELDOUT_MAX)


def half_files(folder: Path) -> dict[str, Path]:
    """The files that ``write_halves`` writes, by name."""
    return {name: folder / f"{name}.jsonl" for name in SIDES}


def split(data: DataConfig) -> tuple[list[tuple[int, Row]], set[int]]:
    """(place of its prompt, row) of each comparison of ``data.source``, and the places that are
    held out. Raises DataError for a source that can't be read."""
    heldout = HeldOut(data)
    rows = [
        (heldout.place(row.prompt), row)
        for row in formats.iterate(data.source, "reward", Counter(), data.skip_bad_rows)
    ]
    for place, _ in rows:
        heldout.add(place)
    unseen = heldout.chosen()
    if not unseen:
        raise DataError(
            f"{data.source}: {len(rows)} comparisons, of {heldout.distinct} prompts; expected two prompts or more"
        )
    return rows, unseen


def write_halves(data: DataConfig, folder: Path) -> dict[str, Path]:
    """Write the files of rows in ``folder``; their paths by name.

    "base" and "judge" have the comparisons of one half of the training prompts each, and of the
    other half the better replies only. "full" has all comparisons. The held-out comparisons are in
    all three, so SFT's rows are the same bytes. Raises DataError as ``split`` does.
    """
    rows, unseen = split(data)

    def native_rows(side: int | None) -> Iterator[dict]:
        for place, row in rows:
            compared = side is None or place in unseen or place % 2 == side
            yield row.as_native("reward" if compared else "sft")

    files = half_files(folder)
    for name, side in SIDES.items():
        dump(files[name], native_rows(side))
    return files


def at_least_one(text: str) -> int:
    """argparse's type of a count."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def minutes(text: str) -> float:
    """argparse's type of a time."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected minutes, more than 0")


def section_of(key: str) -> str:
    """The section that a key of ``--set`` belongs to; of "resources.sft.nodes" it is sft."""
    return key.strip().removeprefix("resources.").split(".")[0]


def parse_settings(sets: Sequence[str]) -> dict[str, str]:
    """Key -> value, as text, of ``--set`` options. Raises ConfigError for a malformed option and
    for a section that the study sets itself."""
    settings = {}
    for text in sets:
        tables, where = parse_set(text), f"--set {text}"
        check_sections(tables, where)
        key, _, value = text.partition("=")
        section = section_of(key)
        if section in FIXED_SECTIONS:
            raise ConfigError(f"{where}: the study sets {section} itself: {FIXED_SECTIONS[section]}")
        settings[key.strip()] = value
    return settings


def check_settings(folder: Path, values: dict) -> None:
    """Raises ConfigError for a key that no stage has, or a value that it can't take."""
    full_tables(folder, layered(RECIPE, [], settings_text(values)), PIPELINES[PPO])


def select_works(works: Sequence[Work], only: str) -> list[Work]:
    """The works that ``only`` lists, and what they need; all of them where it is empty. Raises
    ConfigError for an unknown name."""
    if not only:
        return list(works)
    names, selected = [work.name for work in works], {name.strip() for name in only.split(",")}
    for name in sorted(selected.difference(names)):
        raise ConfigError(f"--only {name}: no such work{near(name, names)}; there are: {', '.join(names)}")
    for work in reversed(works):  # what a work needs stands before it
        selected |= set(work.after) if work.name in selected else set()
    return [work for work in works if work.name in selected]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this process. Raises Busy, which names the holder, where another process
    has it."""
    path = folder / "study.lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(path))
        except Busy:
            raise Busy(
                f"{_holder(path)} works in {folder}: wait for its end, or give another folder with --runs"
            ) from None
        path.write_text(json.dumps({**this_process(), "command": sys.argv}) + "\n", encoding="utf-8")
        yield


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} ({' '.join(holder['command'])})"
    except (OSError, ValueError, KeyError):  # it has only just started
        return "another process"
