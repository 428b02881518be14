"""What benchmarks/learning/learns_smollm2.py trains on, and what it checks before: a slip of the
pen costs no hour of GPUs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from side_by_side import Work

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
OURS = {
    "data": "HH_FILE gives its rows, and what is held out of them is the study's",
    "model": "it is --model",
    "mtbench": "the study's evaluation is not the launcher's",
}
"""Section -> why --set can't change it."""
SIDES = {"base": 0, "judge": 1, "full": None}
"""File of rows -> which half of the training prompts it has the comparisons of; None: of all."""


def halves_in(folder: Path) -> dict[str, Path]:
    """Where ``halves`` puts them."""
    return {name: folder / f"{name}.jsonl" for name in SIDES}


def split(data: DataConfig) -> tuple[list[tuple[int, Row]], set[int]]:
    """(place of its prompt, row) of each comparison of ``data.source``, and the places that are
    held out. DataError for a source that can't be read."""
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


def halves(data: DataConfig, folder: Path) -> dict[str, Path]:
    """Files of one's own rows in ``folder``: "base" and "judge" have the comparisons of one half of
    the training prompts, of the other half the better replies only, "full" all comparisons; the
    held-out comparisons are in all three. So SFT's rows are the same bytes. Raises DataError as
    ``split`` does."""
    rows, unseen = split(data)

    def written(side: int | None) -> Iterator[dict]:
        for place, row in rows:
            compared = side is None or place in unseen or place % 2 == side
            yield formats.as_native(row, "reward" if compared else "sft")

    made = halves_in(folder)
    for name, side in SIDES.items():
        dump(made[name], written(side))
    return made


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


def settings(sets: Sequence[str]) -> dict[str, str]:
    """Key -> value, as text, of ``--set`` options. ConfigError for one that is malformed, or of a
    section that isn't passed on."""
    made = {}
    for text in sets:
        tables, where = parse_set(text), f"--set {text}"
        check_sections(tables, where)
        key, _, value = text.partition("=")
        section = key.strip().removeprefix("resources.").split(".")[0]
        if section in OURS:
            raise ConfigError(f"{where}: the study sets {section} itself: {OURS[section]}")
        made[key.strip()] = value
    return made


def words(values: dict) -> list[str]:
    """``--set``'s arguments."""
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in values.items()]


def check_settings(folder: Path, values: dict) -> None:
    """ConfigError for a key that no stage knows, or a value that it can't take, of any pipeline."""
    full_tables(folder, layered(RECIPE, [], words(values)), PIPELINES[PPO])


def chosen(works: Sequence[Work], only: str) -> list[Work]:
    """Those whose names ``only`` lists, and what they need; all if it is empty. ConfigError for a
    name that is none."""
    if not only:
        return list(works)
    names, wanted = [work.name for work in works], {name.strip() for name in only.split(",")}
    for name in sorted(wanted.difference(names)):
        raise ConfigError(f"--only {name}: no such work{near(name, names)}; there are: {', '.join(names)}")
    for work in reversed(works):  # what a work needs stands before it
        wanted |= set(work.after) if work.name in wanted else set()
    return [work for work in works if work.name in wanted]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process. Busy, with who has it, where another one does."""
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
        held = json.loads(path.read_text(encoding="utf-8"))
        return f"process {held['pid']} on {held['host']} ({' '.join(held['command'])})"
    except (OSError, ValueError, KeyError):  # it has only just begun
        return "another process"
