"""Reads training rows from .jsonl and .jsonl.gz: our three formats, Anthropic HH, TRL preferences and chat messages.

Every row, whatever its format, becomes a ``Row``: a prompt with the replies to it, best first known by score. A row that
can't be read is an error that names file, line and field; a row that can be read but not used (HH has such) is counted by reason.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from training.data import dialogue

EXIT_DATA = 65
_SURROGATE = re.compile("[\ud800-\udfff]")
LFS_POINTER = b"version https://git-lfs"
FORMATS = ('Anthropic HH {"chosen", "rejected"}, TRL {"prompt", "chosen", "rejected"} or {"query", "response": [...], "score": [...]}')
NEEDS = {"rlhf": (0, "a prompt"), "sft": (1, "a response"), "reward": (2, "two replies to compare")}
"""Stage -> (fewest replies to a prompt, in words)."""


class DataError(ValueError):
    """Training data that can't be used; the message names the file, the line and the field."""

    exit_code = EXIT_DATA


class BadRow(ValueError):
    """A malformed row: the message names the field. ``iterate`` adds file and line."""


class Unusable(ValueError):
    """A well-formed row that training must not see; the message is the reason that is counted."""


class Row(NamedTuple):
    """One prompt and the replies to it: none (RLHF), one (SFT) or several (comparisons)."""

    prompt: str
    responses: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def best(self) -> str:
        """The reply with the highest score, the first of equals."""
        return self.responses[self.scores.index(max(self.scores))]


def as_native(row: Row, stage: str) -> dict:
    """``row`` as ``stage``'s JSON object (rlhf.md, section 2)."""
    if stage == "reward":
        return {"query": row.prompt, "response": list(row.responses), "score": list(row.scores)}
    return {"prompt": row.prompt} | ({"response": row.best} if stage == "sft" else {})


def iterate(path: str | Path, stage: str, counts: Counter, skip_bad_rows: bool = False) -> Iterator[Row]:
    """Usable rows of a file, in its order; ``counts`` gets "rows" read and "dropped: REASON".

    Raises DataError for a malformed row (counted instead if ``skip_bad_rows``) and for one that lacks what the stage needs.
    """
    fewest, need = NEEDS[stage]
    for number, line in _lines(Path(path)):
        counts["rows"] += 1
        try:
            row = parse(_object(line))
        except Unusable as reason:
            counts[f"dropped: {reason}"] += 1
            continue
        except BadRow as error:
            if not skip_bad_rows:
                raise DataError(f"{path}:{number}: {error}; data.skip_bad_rows = true counts and skips such rows") from None
            counts[f"dropped: bad row, {str(error).split(':')[0]}"] += 1
            continue
        if len(row.responses) < fewest:
            raise DataError(f"{path}:{number}: this row has {len(row.responses)} replies, but the {stage} stage needs {need}: "
                            f"give {FORMATS}")
        yield row


def parse(row: dict) -> Row:
    """The format is known by the fields. Raises BadRow (malformed) or Unusable (well-formed, but not for training)."""
    if "chosen" in row and "rejected" in row:
        return _trl(row) if "prompt" in row or isinstance(row["chosen"], list) else _hh(row)
    if "messages" in row:
        return _chat(row)
    prompt = "prompt" if "prompt" in row else "query"
    if prompt not in row:
        raise BadRow(f"prompt: missing; the fields are {', '.join(row) or 'none'}; expected one of our formats or {FORMATS}")
    if "score" in row or isinstance(row.get("response"), list):
        return _comparison(row, prompt)
    if "response" in row:
        return _usable(Row(_text(row, prompt), (_text(row, "response"),), (0.0,)))
    return _usable(Row(_text(row, prompt)))


def _hh(row: dict) -> Row:
    sides = []
    for field in ("chosen", "rejected"):
        side = dialogue.split(_text(row, field))
        if side is None:
            raise BadRow(f"{field}: no turn begins with {dialogue.CUE!r}")
        sides.append(side)
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Unusable("prompts of chosen and rejected differ")
    return _preference(prompt, chosen, rejected)


def _trl(row: dict) -> Row:
    replies = []
    prompts = []
    for field in ("chosen", "rejected"):
        if isinstance(row[field], list):
            turns = _messages(row, field, last="assistant")
            prompts.append(turns[:-1])
            replies.append(turns[-1][1])
        else:
            replies.append(_text(row, field))
    if any(turns != prompts[0] for turns in prompts) or ("prompt" not in row and len(prompts) < 2):
        raise Unusable("prompts of chosen and rejected differ")
    # A prompt that is a string is the first turn of a longer conversation that the replies hold.
    if "prompt" not in row or (isinstance(row["prompt"], str) and prompts and len(prompts[0]) > 1):
        prompt = dialogue.from_messages(prompts[0]) + dialogue.CUE
    elif isinstance(row["prompt"], list):
        prompt = dialogue.from_messages(_messages(row, "prompt")) + dialogue.CUE
    else:
        prompt = dialogue.as_prompt(_text(row, "prompt"))
    return _preference(prompt, *map(dialogue.as_reply, replies))


def _preference(prompt: str, chosen: str, rejected: str) -> Row:
    return _usable(Row(prompt, (chosen, rejected), (1.0, 0.0)))


def _chat(row: dict) -> Row:
    turns = _messages(row, "messages", last="assistant")
    return _usable(Row(dialogue.from_messages(turns[:-1]) + dialogue.CUE, (dialogue.as_reply(turns[-1][1]),), (0.0,)))


def _comparison(row: dict, prompt: str) -> Row:
    responses, scores = (row.get(field) for field in ("response", "score"))
    if not isinstance(responses, list):
        raise BadRow(f"response: {_short(responses)}: expected a list of strings")
    responses = [_string(response, f"response[{at}]") for at, response in enumerate(responses)]
    if not isinstance(scores, list) or not all(type(s) in (int, float) and abs(s) <= sys.float_info.max for s in scores):
        raise BadRow(f"score: {_short(scores)}: expected a list of finite numbers")
    if len(responses) < 2 or len(responses) != len(scores):
        raise BadRow(f"score: {len(scores)} scores for {len(responses)} responses; expected one each and at least 2")
    return _usable(Row(_text(row, prompt), tuple(responses), tuple(map(float, scores))))


def _usable(row: Row) -> Row:
    """``row`` itself; raises Unusable for what would teach a model something false."""
    if not row.prompt.strip():
        raise Unusable("empty prompt")
    if not all(response.strip() for response in row.responses):
        raise Unusable("empty reply")
    if len(row.responses) > 1 and (len(set(row.scores)) == 1 or len(set(row.responses)) == 1):
        raise Unusable("replies or their scores are equal")
    if row.responses and dialogue.has_marker(row.best):
        raise Unusable("role marker inside the better reply")
    return row


def _messages(row: dict, field: str, last: str = "") -> list[tuple[str, str]]:
    """(role, content) of a list of chat messages; ``last`` is the role that the last one must have."""
    turns = []
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{field}: {_short(messages)}: expected a list of messages")
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f'{field}[{at}]: {_short(message)}: expected {{"role", "content"}}')
        if message["role"] not in ("system", "user", "human", "assistant"):
            raise BadRow(f"{field}[{at}].role: {_short(message['role'])}: expected system, user or assistant")
        turns.append((message["role"], _text(message, "content", f"{field}[{at}].content")))
    if last and turns[-1][0] != last:
        raise BadRow(f"{field}[{len(turns) - 1}].role: {turns[-1][0]!r}: expected the last message to be the {last}'s")
    return turns


def _text(row: dict, field: str, where: str = "") -> str:
    return _string(row[field], where or field)


def _string(value, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where}: {_short(value)}: expected a string")
    if _SURROGATE.search(value):
        raise BadRow(f"{where}: {_short(value)}: half of a surrogate pair is no character")
    return value


def _object(line: bytes) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"line: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow(f"line: {_short(row)}: expected a JSON object")
    return row


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based line number, bytes) of every line that is not blank. Raises DataError where the file itself can't be read."""
    try:
        with open(path, "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise DataError(f"{path}: a git-LFS pointer, not the data itself; fetch it with `git lfs pull`")
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is no part of the JSON
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {error}") from None


def because(counts: Counter) -> str:
    """Why nothing was left, in words: ": 3 rows read; dropped: 3 empty reply"."""
    reasons = [f"{number} {name.removeprefix('dropped: ')}" for name, number in counts.items() if name.startswith("dropped: ")]
    return f": {counts['rows']} rows read; dropped: {', '.join(reasons)}" if reasons else ": the file is empty"


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
