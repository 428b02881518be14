"""Sort one source of rows into the files of the stages: which stage can use a row, which prompts
are held out, which rows repeat."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from training.config.data import DataConfig
from training.data import demo, formats
from training.data.rows import HH_TEXT, Row, parse
from training.data.split import HeldOut, Repeats
from training.data.styles import Style
from training.errors import DataError
from training.files import atomic

TOKENIZER_ROWS = 20_000
"""Most SFT rows that the demo's tokenizer is trained on."""
STAGES = ("sft", "reward", "rlhf")
Counts = dict[str, int]


class Writer:
    """Writes the files of a folder row by row under a temporary folder; ``publish`` moves them into
    place. ``counts``: rows of each file."""

    def __init__(self, folder: Path):
        self.folder, self.temporary, self.counts = folder, folder / ".preparing", {}
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        self._files: dict[str, TextIO] = {}

    def open(self, *names: str) -> None:
        for name in names:
            self.counts[name] = 0
            path = self.temporary / name
            self._files[name] = path.open("w", encoding="utf-8", newline="\n")  # publish closes it

    def add(self, name: str, row: dict) -> None:
        self._files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[name] += 1

    def rows(self, name: str) -> Iterator[dict]:
        """Rows written to a file so far."""
        self._files[name].flush()
        with open(self.temporary / name, encoding="utf-8") as file:
            yield from map(json.loads, file)

    def flush(self) -> None:
        """What was added can be read from the files in ``temporary``."""
        for file in self._files.values():
            file.flush()

    def publish(self, counts: dict) -> None:
        """Move each file into place once it is on the disk. counts.json, with the number of rows of
        each, comes last."""
        self.open("counts.json")
        self._files["counts.json"].write(json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
        for name, file in self._files.items():
            file.close()
            atomic.sync(self.temporary / name)
            os.replace(self.temporary / name, self.folder / name)
        atomic.sync(self.folder)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self._files.values():
            file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # what is not empty stays
            self.folder.rmdir()


def from_demo(data: DataConfig, writer: Writer, style: Style = HH_TEXT) -> Counts:
    """Write the generated data in the words of ``style`` -> counts of its sources."""
    prompts = [question.prompt for question in demo.questions()]
    heldout = HeldOut(data)
    for prompt in prompts:
        heldout.add(heldout.place(prompt))
    chosen = heldout.chosen()
    kinds = {name: stage for stage in STAGES for name in names(stage)}
    for name, rows in demo.rows({prompt for prompt in prompts if heldout.place(prompt) in chosen}, data.seed).items():
        writer.open(name)
        for row in rows:
            native = parse(row, style).as_native(kinds[name])
            writer.add(name, native | ({"rubric": row["rubric"]} if "rubric" in row else {}))
    return {"prompts": len(prompts)}


class _Remembered:
    """What a check said of each line of a file, so that the second reading need not check."""

    def __init__(self, check: formats.Check):
        self.check, self.problems = check, {}

    def first(self, rows: list[tuple[int, Row]]) -> list:
        problems = self.check(rows)
        self.problems |= {number: error for (number, _), error in zip(rows, problems, strict=True) if error}
        return problems

    def again(self, rows: list[tuple[int, Row]]) -> list:
        return [self.problems.get(number) for number, _ in rows]


def from_source(data: DataConfig, writer: Writer, style: Style = HH_TEXT, check: formats.Check | None = None) -> Counts:
    """Sort the rows of a file, in the words of ``style``, -> counts of rows read, dropped and
    repeated.

    Every prompt goes to RLHF. Its best reply, if it has one, goes to SFT, and all of them, if there
    are two, to the reward model. The file is read twice, and no row stays in memory.

    Each stage contributes a share of its own prompts to the held-out ones, which no stage trains
    on: a few comparisons among many plain prompts are represented, too. Raises DataError for a bad
    row, for no usable row, and for fewer than 2 prompts.
    """
    counts: Counter = Counter()
    heldout = {stage: HeldOut(data) for stage in STAGES}
    repeats = {stage: Repeats(writer.temporary / f"digests-{stage}") for stage in STAGES}
    echoes, checks = formats.Echoes(), _Remembered(check) if check else None
    options = {"skip_bad_rows": data.skip_bad_rows, "style": style}
    for row in formats.iterate(data.source, "rlhf", counts, **options, check=checks and checks.first):
        counts.update(formats.unusual(row, echoes))
        place = heldout["rlhf"].place(row.key)
        for stage in _good_for(row):
            heldout[stage].add(place)
            repeats[stage].add(json.dumps(row.as_native(stage)))
    echoes.check(data.source)
    distinct = heldout["rlhf"].distinct
    if not distinct:
        raise DataError(f"{data.source}: no usable row{formats.because(counts)}")
    if distinct < 2:
        raise DataError(f"{data.source}: 1 distinct prompt; expected at least 2: one to train on, one to hold out")
    chosen, is_repeat = set(), {stage: iter(stage_repeats.flags()) for stage, stage_repeats in repeats.items()}
    for stage_heldout in heldout.values():
        chosen |= stage_heldout.chosen()
    writer.open(*(name for stage in STAGES for name in names(stage)))
    for row in formats.iterate(data.source, "rlhf", Counter(), **options, check=checks and checks.again):
        unseen = heldout["rlhf"].place(row.key) in chosen
        # the prompt would teach the reply to a held-out prompt
        continues_heldout = not unseen and any(heldout["rlhf"].place(prompt) in chosen for prompt in row.earlier())
        counts["left out: goes on from a held-out prompt"] += continues_heldout
        for stage in _good_for(row):
            if next(is_repeat[stage]):
                counts[f"repeated: {stage}"] += 1
            elif not continues_heldout:
                writer.add(names(stage)[unseen], row.as_native(stage))
    return dict(+counts)


def _good_for(row: Row) -> list[str]:
    return [stage for stage in STAGES if len(row.responses) >= formats.NEEDS[stage][0]]


def names(stage: str) -> tuple[str, str]:
    """Files of a stage: (training rows, held-out rows)."""
    return f"{stage}.jsonl", "heldout.jsonl" if stage == "rlhf" else f"{stage}_heldout.jsonl"


def without_rows(source: str, stage: str, name: str, read: Counts) -> str:
    """Error message for a file ``name`` without any row for ``stage``: not every source has
    replies, or two to compare."""
    unread = [field.removeprefix("not read: ") for field in read if field.startswith("not read: ")]
    return (
        f"data.source = {source!r} gives {name}, which the {stage} stage reads, no row; sft needs rows with a reply, "
        f"reward and dpo rows with two or more to compare{'; nothing reads ' + ', '.join(unread) if unread else ''}; "
        "submit a part of the chain with --until, or give another source"
    )
