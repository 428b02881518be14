"""The table against LMSYS's published averages, and real judgment files against their own texts."""

import json

import pytest

from eval.files.jsonl import read
from eval.judge import verdict
from eval.questions import CATEGORIES
from eval.report import table
from eval.scores import ratings as scores
from tests.support.ratings import JUDGMENTS, OFFICIAL, results

BLOCKS = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
MT_BENCH = {number: BLOCKS[(number - 81) // 10] for number in range(81, 161)}


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"{OFFICIAL} is not here")
def test_every_published_average_to_six_decimals():
    published = json.loads((OFFICIAL / "published_average.json").read_text())
    found = scores.table(read(OFFICIAL / "gpt-4_single.jsonl"), MT_BENCH, list(published), seed=0)
    assert {name: round(row["micro"]["mean"], 6) for name, row in found["models"].items()} == published
    assert found["models"]["mpt-7b-chat"]["n_valid"] == 159 and found["models"]["mpt-7b-chat"]["invalid"] == {
        "unparsed": 1
    }
    assert found["models"]["mpt-7b-chat"]["macro"] != pytest.approx(published["mpt-7b-chat"], abs=1e-6)
    assert scores.passed(found) and found["duplicates"] == 0


@pytest.mark.skipif(not JUDGMENTS.is_dir(), reason=f"{JUDGMENTS} is not here")
@pytest.mark.parametrize("name", ["granite", "medusa"])
def test_every_stored_score_parses_again(name):
    rows = read(JUDGMENTS / f"{name}_gpt-4_single.jsonl")
    assert [verdict.first_rating(row["judgment"]) for row in rows] == [row["score"] for row in rows]


@pytest.mark.skipif(not JUDGMENTS.is_dir(), reason=f"{JUDGMENTS} is not here")
def test_the_granite_file_gets_no_average():
    found = scores.table(read(JUDGMENTS / "granite_gpt-4_single.jsonl"), MT_BENCH, ["granite-7b-lab"], seed=0)
    row = found["models"]["granite-7b-lab"]
    assert not scores.passed(found) and "micro" not in row and "categories" not in row
    assert row["invalid"] == {"out of range": 2, "unparsed": 120} and row["n_valid"] == 38


@pytest.mark.parametrize(
    "text, rating",
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        ("[[10]] and [[2]]", 10),
        ("see [3]; Rating: [[8]]", 8),
        ("Rating: [6]", 6),
        ("Rating: 6", -1),
        ("[[rating]]", -1),
        ("", -1),
        ("[[-3]]", -1),
    ],
)
def test_rating(text, rating):
    assert verdict.first_rating(text) == rating


def judgments(model: str, ratings: dict[tuple[int, int], float]) -> list[dict]:
    return [
        {"model": model, "question_id": question, "turn": turn, "score": score}
        for (question, turn), score in ratings.items()
    ]


def test_a_table_by_hand():
    """Two maths questions and one on coding. a: 2 4 | 6 8 | 10 10; b: 3 5 | 6 8 | 1 1, and a
    repeated line that wins."""
    categories = {1: "math", 2: "math", 3: "coding"}
    a = judgments("a", {(1, 1): 2, (1, 2): 4, (2, 1): 6, (2, 2): 8, (3, 1): 10, (3, 2): 10})
    b = judgments("b", {(1, 1): 9, (1, 2): 5, (2, 1): 6, (2, 2): 8, (3, 1): 1, (3, 2): 1})
    found = scores.table([*a, *b, *judgments("b", {(1, 1): 3})], categories, ["a", "b"], seed=0)
    one, two = found["models"]["a"], found["models"]["b"]
    assert (
        one["micro"]["mean"] == pytest.approx(40 / 6)
        and one["macro"] == pytest.approx((5 + 10) / 2)
        and one["turns"] == [6, 22 / 3]
    )
    assert two["categories"]["math"]["mean"] == 5.5 and two["micro"]["mean"] == 4 and found["duplicates"] == 1
    difference = found["differences"]["b"]
    assert difference["micro"]["mean"] == pytest.approx(4 - 40 / 6)
    assert (difference["wins"], difference["ties"], difference["losses"]) == (1, 1, 1)
    coding = difference["categories"]["coding"]
    assert (coding["mean"], coding["low"], coding["high"]) == (-9, -9, -9)
    row = table.rows(found)[2]
    assert row[0].text == "b − a" and row[-1].text == "1 won, 1 tied, 1 lost"
    # coding: its interval excludes 0, but it is one question
    assert row[1].text == "-9.00" and not row[1].bold
    assert row[4].text == "+0.50" and not row[4].bold  # math: +1 and 0
    assert [cell.text for cell in table.rows(found)[0]] == [
        "a",
        "10.00",
        "-",
        "-",
        "5.00",
        "-",
        "-",
        "-",
        "-",
        "6.67",
        "7.50",
        "6/6",
    ]


@pytest.mark.parametrize("questions, lower, bold", [(6, 0, True), (5, 0, False), (8, 4, False)])
def test_bold_is_for_differences_that_are_separated_from_zero(questions, lower, bold):
    """b is one point above a in every question, except for the first ``lower``, where it is one
    below."""
    places = [(question, turn) for question in range(questions) for turn in (1, 2)]
    a = judgments("a", dict.fromkeys(places, 5))
    b = judgments("b", {place: 4 if place[0] < lower else 6 for place in places})
    found = scores.table(a + b, dict.fromkeys(range(questions), "math"), ["a", "b"], seed=0)
    assert table.rows(found)[2][4].bold is bold and ("**+1.00**" in table.markdown(results(found))) is bold


def test_below_the_gate_no_number_and_no_difference():
    categories = dict.fromkeys(range(10), "math")
    full = judgments("a", {(question, turn): 5 for question in range(10) for turn in (1, 2)})
    for unparsed, covered in ((1, True), (2, False)):  # 19 of 20 is 95%
        holes = judgments(
            "b",
            {
                (question, turn): -1 if question < unparsed and turn == 1 else 5
                for question in range(10)
                for turn in (1, 2)
            },
        )
        found = scores.table(full + holes, categories, ["a", "b"], seed=0)
        assert found["models"]["b"]["covered"] is covered and ("b" in found["differences"]) is covered
    assert all(cell.text in ("b", "-", "18/20") for cell in table.rows(found)[1])
    assert found["models"]["a"]["micro"]["mean"] == 5
    assert len(table.HEADER) == len(CATEGORIES) + 4 == len(table.rows(found)[1])


def test_a_category_without_a_rating_leaves_no_macro():
    categories = dict.fromkeys(range(1, 31), "math") | {31: "stem"}
    rows = [
        {"model": "m", "question_id": number, "turn": turn, "score": 5 if number < 31 else -1}
        for number in categories
        for turn in (1, 2)
    ]
    found = scores.table(rows, categories, ["m"], seed=0)
    assert found["models"]["m"]["covered"] and found["models"]["m"]["macro"] is None
    (shown,) = table.rows(found)
    assert shown[-2].text == "-"
