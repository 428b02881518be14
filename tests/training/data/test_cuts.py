"""What is dropped and cut is counted before anything runs: of all rows of a small file, of a sample
of a large one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from training.config.data import DataConfig, ModelConfig, PrepareConfig, PreparePaths
from training.data import cuts, formats, peek
from training.data.cache import TokenRows, cached
from training.data.prepare import prepare
from training.data.tokenised import TextTokenizer
from training.data.tokenizer import Tokenizer

CUE = "\n\nAssistant:"
STAGES = {
    "sft": ("sft", "seq_length", 48),
    "reward": ("reward", "seq_length", 48),
    "rlhf": ("rlhf", "prompt_length", 16),
}


def rows(count: int = 40) -> list[dict]:
    """Every tenth pair differs behind 300 words only; every eighth is a tie; every fifth has a long
    prompt."""
    made = []
    for number in range(count):
        more, asked = "word " * (300 * (number % 10 == 3)), "why " * (90 * (number % 5 == 1))
        made.append(
            {
                "prompt": f"\n\nHuman: {asked}What is {number}?{CUE}",
                "chosen": f" {more}It is {number}.",
                "rejected": f" {more}It is {number if number % 8 == 7 else 'none'}.",
            }
        )
    return made


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [
                *rows(),
                {"prompt": "a", "chosen": "", "rejected": "b"},
                rows()[0],
                {"prompt": "Why?", "chosen": f"\n\nHuman: Why?{CUE} So.", "rejected": "No."},
            ]
        )
    )
    return path


def settings(file: Path, **model) -> str:
    return json.dumps(
        {
            "data": asdict(DataConfig(str(file))),
            "model": {**asdict(ModelConfig()), "demo_vocab": 300, **model},
            "stages": STAGES,
        }
    )


@pytest.mark.parametrize("kind", ["sft", "reward", "rlhf"])
def test_counts_of_the_cache_are_those_of_the_rows(tmp_path, file, demo_run, kind):
    tokenizer = Tokenizer(demo_run / "model")
    if kind == "sft":
        file.write_text(
            "".join(json.dumps({"prompt": row["prompt"], "response": row["chosen"]}) + "\n" for row in rows())
        )
    listed = TextTokenizer(tokenizer).tokenise(list(formats.iterate(file, kind, Counter())), kind)
    stored = TokenRows(cached(file, kind, tokenizer))
    for length in (4, 20, 48, 200, 4000):
        assert cuts.count(stored, kind, length) == cuts.count(listed, kind, length)
    all_cut, none_cut = cuts.count(stored, kind, 4), cuts.count(stored, kind, 4000)
    assert all_cut["longer"] == len(stored) and none_cut["longer"] == 0 == none_cut["alike"]
    assert cuts.sentence("x.y", 4, all_cut).startswith(f"all {len(stored)} rows are longer than x.y = 4 and are cut")
    assert cuts.sentence("x.y", 4000, none_cut) == ""


def test_pairs_that_are_the_same_after_the_cut_are_counted(file, demo_run):
    counts = cuts.count(TokenRows(cached(file, "reward", Tokenizer(demo_run / "model"))), "reward", 200)
    # rows 3, 13, 33; row 23 is a tie
    assert counts["alike"] == 3 == counts["unended"] and counts["longer"] >= 3
    assert "the replies of 3" in cuts.sentence("reward.seq_length", 200, counts)


def test_a_small_file_is_looked_at_as_the_preparation_does(tmp_path, file, capsys):
    assert peek.main([str(file), "43", settings(file)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{file}: all 43 rows can be read, 6 of them are not used"
    paths = PreparePaths(str(tmp_path / "data"), str(tmp_path / "model"))
    prepare(PrepareConfig(paths, ModelConfig(demo_vocab=300), DataConfig(str(file))))
    assert lines == cuts.lines(tmp_path / "data", STAGES)
    assert "1 of 43 rows kept: prompt cut from the replies that began with it" in lines
    assert (
        cuts.main([str(tmp_path / "data"), json.dumps(STAGES)]) == 0 and capsys.readouterr().out.splitlines() == lines
    )
    (tmp_path / "data/counts.json").write_text('{"read": {"rows": 9}}')
    assert cuts.main([str(tmp_path / "data"), "{}"]) == 0 and capsys.readouterr().out == ""
    assert lines[:2] == ["5 of 43 rows dropped: replies or their scores are equal", "1 of 43 rows dropped: empty reply"]


def test_of_a_large_file_it_says_that_it_is_a_sample(file, demo_run, capsys):
    assert peek.main([str(file), "20", settings(file, checkpoint=str(demo_run / "model"))]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert "the first 20 rows (a sample: more follow) can be read" in first
    assert any(
        line.startswith("of the first 18 usable rows: ") and "rlhf.prompt_length = 16" in line for line in lines
    ), lines


@pytest.mark.parametrize(
    ("change", "model", "code", "message"),
    [
        (lambda rows: rows, {"demo_vocab": 4000}, 64, "model.demo_vocab = 4000: the text gives"),
        (lambda rows: rows, {"checkpoint": "absent"}, 64, "no tokenizer.json in it"),
        (lambda rows: rows[:1], {}, 65, "1 distinct prompt"),
        (
            lambda rows: [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows],
            {},
            65,
            "gives reward.jsonl, which the reward",
        ),
    ],
)
def test_what_the_preparation_would_refuse_is_refused_before(tmp_path, capsys, change, model, code, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in change(rows())))
    assert peek.main([str(file), "1000", settings(file, **model)]) == code
    assert message in capsys.readouterr().err
