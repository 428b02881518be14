"""``python -m eval.scores FILE`` on FastChat's own files and on damaged ones."""

import json
from pathlib import Path

import pytest

from eval.files.jsonl import dump, read
from eval.report import judgment_table
from tests.support.ratings import JUDGMENTS, OFFICIAL, RATINGS, pair, row


def run(path: Path, rows: list[dict], capsys, *more: str) -> tuple[int, str, str]:
    dump(path, rows)
    code = judgment_table.main([str(path), *more])
    return code, *capsys.readouterr()


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"{OFFICIAL} is not here")
def test_the_official_file_prints_the_published_averages(capsys):
    published = json.loads((OFFICIAL / "published_average.json").read_text())
    assert judgment_table.main([str(OFFICIAL / "gpt-4_single.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: round(model["micro"]["mean"], 6) for name, model in found["scores"]["models"].items()} == published


@pytest.mark.skipif(not JUDGMENTS.is_dir(), reason=f"{JUDGMENTS} is not here")
def test_rows_that_repeat_others_give_two_averages_and_the_reason(tmp_path, capsys):
    """A file in which FastChat judged half of the answers again, two points higher."""
    rows = [each for each in read(JUDGMENTS / "medusa_gpt-4_single.jsonl") if each["model"] == "vicuna-7b-v1.3"]
    again = [each | {"score": min(10, each["score"] + 2)} for each in rows[::2]]
    every, last = [each["score"] for each in rows + again], [each["score"] for each in rows[1::2] + again]
    code, out, _ = run(tmp_path / "x.jsonl", rows + again, capsys)
    assert code == 0 and f"| {sum(last) / len(last):.2f} [" in out
    assert (
        f"vicuna-7b-v1.3: 80 rows repeat the place of another (question and turn). Avg counts the last of each; "
        f"FastChat's show_result averages all 240 rows: {sum(every) / 240:.6f} instead of {sum(last) / 160:.6f}."
    ) in out


def test_single_ratings_by_hand(tmp_path, capsys):
    code, out, _ = run(tmp_path / "x.jsonl", RATINGS, capsys)
    assert (
        code == 0
        and "judge: gpt-4 · 10 questions" in out
        and "| m | - | - | - | - | - | - | - | 7.50 [7.50, 7.50] | 7.50 " in out
    )
    other = [each | {"model": "n", "score": 9} for each in RATINGS]
    code, out, _ = run(tmp_path / "x.jsonl", RATINGS + other, capsys, "--baseline", "n")
    assert "| m − n |" in out and "**-1.50**" in out
    code, out, _ = run(tmp_path / "x.jsonl", [each | {"score": -1} for each in RATINGS[:4]] + RATINGS[4:], capsys)
    assert code == 4 and "m: no average, because 16 of 20 ratings are valid (4 unparsed) and 95% are needed." in out
    aloud = [each | {"judgment": "[[5]] is the form. Rating: [[9]]", "score": 5} for each in RATINGS]
    code, out, _ = run(tmp_path / "x.jsonl", aloud, capsys)
    assert code == 0 and "In 20 of 20 judgments the last statement is another rating than the score." in out


def test_pairs_by_hand(tmp_path, capsys):
    rows = [
        pair(question, turn, "model_1", "model_1" if turn == 1 else "model_2")
        for question in range(81, 91)
        for turn in (1, 2)
    ]
    code, out, _ = run(tmp_path / "x.jsonl", [*rows, rows[0]], capsys)
    assert code == 0 and "| a | b | **75.0%** [75.0%, 75.0%] | - | 10 | 10 | 0 | 10 of 20 |" in out
    assert "1 rows repeat a comparison: the last of each counts" in out
    code, out, _ = run(tmp_path / "x.jsonl", rows, capsys, "--json")
    assert json.loads(out)["pairwise"][0]["win_rate"]["mean"] == 0.75
    code, out, _ = run(tmp_path / "x.jsonl", [each | {"g1_winner": "error"} for each in rows], capsys)
    assert code == 4 and "a against b: no win rate, because 0 of 20 comparisons have a verdict in both orders" in out


def test_categories_are_those_of_the_set(tmp_path, capsys):
    folder = tmp_path / "out/model_judgment"
    folder.mkdir(parents=True)
    rows = [row(number, turn, 7) for number in (1, 2) for turn in (1, 2)]
    code, _, said = run(folder / "x.jsonl", rows, capsys)
    assert (
        code == 65
        and "question 1 is not in MT-Bench (81 to 160); name the set that was judged: --questions FOLDER" in said
    )
    # 2 of its 24 questions
    assert run(folder / "x.jsonl", rows, capsys, "--questions", "embedded")[0] == 4
    dump(
        tmp_path / "out/question.jsonl",
        [{"question_id": number, "category": "math", "turns": ["a", "b"]} for number in (1, 2)],
    )
    assert "| m | - | - | - | 7.00 " in run(folder / "x.jsonl", rows, capsys)[1]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no judgments; expected rows as FastChat's gen_judgment.py writes them"),
        ([{}], "row 1: no 'question_id'; expected a row of"),
        ([row(81, 1, 5), row(81, 3, 5)], "row 2: turn = 3: expected 1 or 2"),
        ([row(81, 1, "5")], 'row 1: score = "5": expected a number'),
        ([row(81, 1, None)], "score = null: expected a number"),
        ([row("81", 1, 5)], 'question_id = "81": expected a whole number'),
        ([row(81, 1, 5) | {"judge": "gpt-4"}], 'judge = "gpt-4": expected [the judge\'s name'),
        ([row(81, 1, 5, model=[1])], "expected a text"),
        ([row(81, 1, 5), pair(81, 1, "tie", "tie")], "ratings and comparisons together"),
        ([pair(81, 1, "A", "tie")], "g1_winner = 'A'"),
        ([row(81, 1, 5), row(81, 1, 5) | {"judge": ["j", "p"]}], "judged by gpt-4, j: name one of them, --judge NAME"),
        ([row(81, 1, 5, repeat=10**9)], "repeat = 1000000000: expected a number from 0 to 99"),
    ],
)
def test_a_bad_row_is_named(rows, message, tmp_path, capsys):
    code, out, said = run(tmp_path / "x.jsonl", rows, capsys)
    assert code == 65 and message in said and str(tmp_path / "x.jsonl") in said and out == "" and said.count("\n") == 1


def test_a_bad_file_or_option_is_named(tmp_path, capsys):
    for content, message in ((b"{", "line 1: not JSON"), (b"\xff", "not UTF-8"), (b"[" * 100_000, "brackets too deep")):
        (tmp_path / "x").write_bytes(content)
        assert judgment_table.main([str(tmp_path / "x")]) == 65 and message in capsys.readouterr().err
    assert judgment_table.main([str(tmp_path / "none")]) == 65 and "No such file" in capsys.readouterr().err
    assert judgment_table.main(["/dev/zero"]) == 65 and "it is not a file" in capsys.readouterr().err
    dump(tmp_path / "x", RATINGS)
    for options in ((), ("--baseline", "none"), ("--seed", "-1"), ("--nonsense",)):
        with pytest.raises(SystemExit) as end:
            judgment_table.main([*([str(tmp_path / "x")] if options else []), *options])
        assert end.value.code == 2
