"""Reads files of training rows, .jsonl and .jsonl.gz, of any of the formats in
training/data/rows.py.

A row that can't be read is an error that names file, line and field. A row that can be read but not
used (HH has such) is counted by reason. A field that nothing reads is counted by name: it may hold
the replies under a name of the user's own.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from training.data.rows import COMPARISONS, FORMATS, HH_TEXT, Row, parse, unread
from training.data.source import lines
from training.data.styles import Style
from training.data.turns import BadRow, Unusable, short
from training.errors import DataError

NEEDS = {
    "rlhf": (0, "a prompt", FORMATS),
    "sft": (1, "a response", FORMATS),
    "reward": (2, "two replies to compare", COMPARISONS),
}
"""Stage -> (fewest replies to a prompt, the need as a phrase, formats that have them)."""
Check = Callable[[list[tuple[int, Row]]], list[BadRow | Unusable | None]]
"""[(line, row), ...] -> what is wrong with each."""
AT_ONCE = 64
"""Rows that a check is given together."""
MOST_NAMES = 50
"""Unread fields are counted by name until the counts have this many entries."""


def iterate(
    path: str | Path,
    stage: str,
    counts: Counter,
    skip_bad_rows: bool = False,
    most: int | None = None,
    style: Style = HH_TEXT,
    check: Check | None = None,
) -> Iterator[Row]:
    """Usable rows of a file in the words of ``style``, in the file's order, of its first ``most``
    where that is given.

    ``check``: what is wrong with rows beyond their fields. ``counts`` gets "rows" read, "dropped:
    REASON" and "not read: field NAME". Raises DataError for a malformed row (counted instead if
    ``skip_bad_rows``) and for one that lacks what the stage needs.
    """
    fewest, need, expected = NEEDS[stage]
    good = False
    for number, row, problem in _checked(_numbered(path, most, style, counts), check):
        if isinstance(problem, Unusable):
            counts[f"dropped: {problem}"] += 1
            continue
        if isinstance(problem, BadRow):
            if not skip_bad_rows:  # of a file without one good row it would skip all
                fix = "; data.skip_bad_rows = true counts and skips such rows" if good else ""
                raise DataError(f"{path}:{number}: {problem}{fix}")
            counts[f"dropped: bad row, {re.sub(r'[[][0-9]+]', '[]', str(problem).split(':')[0])}"] += 1
            continue
        good = True
        if len(row.responses) < fewest:
            raise DataError(
                f"{path}:{number}: this row has {len(row.responses)} replies, "
                f"but the {stage} stage needs {need}: give {expected}"
            )
        yield row


def _numbered(
    path: str | Path, most: int | None, style: Style, counts: Counter
) -> Iterator[tuple[int, Row | None, ValueError | None]]:
    """(line, row, None) or (line, None, what is wrong with it) of each row."""
    for number, line in itertools.islice(lines(path), most):
        counts["rows"] += 1
        try:
            fields = _object(line)
            row = parse(fields, style)
        except (Unusable, BadRow) as problem:
            yield number, None, problem
            continue
        for name in unread(fields, style):
            name = f"not read: field {short(name)}"
            counts[name if name in counts or len(counts) < MOST_NAMES else "not read: other fields"] += 1
        yield number, row, None


def _checked(numbered: Iterator, check: Check | None) -> Iterator[tuple[int, Row | None, ValueError | None]]:
    """``numbered`` with what ``check`` says of the rows, which it is given several at a time."""
    if check is None:
        yield from numbered
        return
    while batch := list(itertools.islice(numbered, AT_ONCE)):
        rows = [(number, row) for number, row, problem in batch if problem is None]
        problems = dict(zip([number for number, _ in rows], check(rows), strict=True))
        for number, row, problem in batch:
            yield number, row, problem or problems.get(number)


def has_messages(path: str | Path) -> bool:
    """True if the first row of a prepared file has messages, not text, before its reply. Raises
    DataError where the file can't be read."""
    for _, line in lines(path):
        try:
            fields = _object(line)
        except BadRow:
            return False
        return isinstance(fields.get("messages", fields.get("prompt")), list)
    return False


def _object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_fields)
    except UnicodeDecodeError as error:
        raise BadRow(f"line: not UTF-8 at byte {error.start}") from None
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"line: {short(row)}: expected a JSON object")
    return row


def _fields(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Raises BadRow for a name that occurs twice, because the file does not say
    which value is meant."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for at, name in enumerate(names) if name in names[:at])
        raise BadRow(f"{short(name)}: stands twice in one object; expected each field once; remove one")
    return fields


class Echoes:
    """Rows with a reply that begins with its own prompt. Of a few they are answers that repeat the
    question, and stay; of more than a tenth the file has its prompts in its replies, and a model
    would learn to say each question twice."""

    SHARE, SHORTEST, SHORT_SHARE = 0.1, 12, 0.5
    """Share of the rows from which on it is the file; characters of a prompt that no reply repeats
    by chance; share with shorter ones."""

    def __init__(self):
        self.rows = self.echoes = self.short = 0
        self.example = ""

    def add(self, row: Row) -> bool:
        """Add the next row -> True if one of its replies begins with its prompt."""
        self.rows += bool(row.responses)
        question = row.question
        if len(question) < 2 or not any(
            len(reply) > len(question) and reply.lstrip().startswith(question) for reply in row.texts
        ):
            return False
        self.example = self.example or short(question)
        if len(question) < self.SHORTEST:
            self.short += 1
            return False
        self.echoes += 1
        return True

    def check(self, path: str | Path) -> None:
        """Raises DataError where the share of such rows is above the limits."""
        every = self.echoes + self.short
        if self.echoes > max(1, self.SHARE * self.rows) or every > max(1, self.SHORT_SHARE * self.rows):
            raise DataError(
                f"{path}: in {every:,} of {self.rows:,} rows a reply begins with its own prompt "
                f"(e.g. {self.example}), so each question would be learnt as a part of its answer; "
                "remove the prompt from the replies"
            )


def unusual(row: Row, echoes: Echoes) -> list[str]:
    """Keys of the counts for a row that is used although it is unusual: "kept: REASON"."""
    echo = ["reply begins with its prompt"] if echoes.add(row) else []
    return [f"kept: {reason}" for reason in [*row.oddities(), *echo]]


def because(counts: Counter) -> str:
    """Why no row is usable: ": 3 rows read; dropped: 3 empty reply"."""
    reasons = [
        f"{number} {name.removeprefix('dropped: ')}" for name, number in counts.items() if name.startswith("dropped: ")
    ]
    return f": {counts['rows']} rows read; dropped: {', '.join(reasons)}" if reasons else ": the file is empty"


def dropped(read: dict[str, int]) -> list[str]:
    """A line for each reason why rows are not used, or are used although they are unusual."""
    return [
        f"{number:,} of {read['rows']:,} rows {name}"
        for name, number in read.items()
        if name.startswith(("dropped: ", "kept: ", "repeated: ", "left out: "))
    ]
