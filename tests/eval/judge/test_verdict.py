"""A judge's reply: its last statement after its thoughts counts, and FastChat's first mark stays
FastChat's."""

import pytest

from eval.judge.verdict import first_preference, first_rating, preference, rating
from tests.fuzz.damage import within

FORMAT = 'The format says "Rating: [[5]]" for example, and [[1]] is for empty ones.'


@pytest.mark.parametrize(
    "reply, value",
    [
        ("Rating: [[7]]", 7),
        ("[[7.5]]", 7.5),
        (f"<think>{FORMAT}</think>\n\nVery good. Rating: [[9]]", 9),
        (f"{FORMAT} So: [[9]]", 9),
        (f"{FORMAT}</think> Rating: [[9]]", 9),
        (f"<thinking>\n{FORMAT}\n</thinking>[[2]]", 2),
        (f"[THINK]{FORMAT}[/THINK]Rating: [[4]]", 4),
        ("<think>a <think> b</think> [[1]] </think> Rating: [[3]]", 3),
        ("Rating: [[9]] <think>or [[1]]?</think>", 9),
        (f"<|channel|>analysis<|message|>{FORMAT}<|end|><|start|>assistant<|channel|>final<|message|>[[8]]", 8),
        (f"analysis{FORMAT}assistantfinalRating: [[8]]", 8),
        (f"<think>{FORMAT}", -1),
        (f"{FORMAT}</think>I can't say.", -1),
        ("Rating: [[3]]. Its answer holds a stray `</think>`.", 3),
        ("It wrote `<think>` first. Rating: [[3]]", 3),
        ('Rating: [[6]]. (The form "[[rating]]" as in "[[5]]" was asked for.)', 6),
        ('"[[5]]" is the form; mine is "[[8]]".', 8),
        ("Rating: `[[8]]`", 8),
        ("[[3]] at first sight, on reflection [[8]]", 8),
        ("Rating: [6]", 6),
        ("**Rating**: [6], as [1] says", 6),
        ("[10]", 10),
        ("It wrote `values[1] + values[2]`, which is right.", -1),
        ("x = values[1]", -1),
        ("Rating: 6", -1),
        ("[[rating]]", -1),
        ("", -1),
        ("[[-3]]", -1),
        ("[[" + "9" * 400 + ".0]]", -1),
        ("[[" + "9" * 60_000 + "]]", -1),
        ("[[11]]", 11),
        ("[[7]] for its style, but [[-5]]", -1),
        ("[[7]] for its style, but [[1e3]]", -1),
        ("[[7]] for its style. Rating: [[8/10]]", 8),
        ("[[7]] for its style. Rating: [[ 8 ]]", 8),
        (r"[[7]] for its style. Rating: \[\[8\]\]", 8),
        ("[[7]] for its style. Rating: [[8,5]]", -1),
        ("Rating: [[7]] out of [[10]]", 7),
        ("Rating: [[7]]\n(on a scale of [[1]] to [[10]])", 7),
        ("I raise it from [[5]] to [[10]]", 10),
        ("评分：[[8]]", 8),
    ],
)
def test_the_last_statement_after_the_thoughts_is_the_rating(reply, value):
    assert rating(reply) == (value, "" if value != -1 else "unparsed")


@pytest.mark.parametrize("reply", ["Rating: [[7]] because", "`values[1]` goes on", "", FORMAT])
def test_a_reply_that_was_cut_says_nothing(reply):
    assert rating(reply, "length") == (-1, "cut") and preference(reply + "[[A]]", "length") == ("error", "cut")


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ('<think>I answer "[[A]]" if A is better, "[[B]]" if B is.</think>My final verdict is: [[B]]', "B"),
        ("[[B]], not [[C]]", "tie"),
        ('I must write "[[A]]" if A is better, "[[B]]" if B is. My verdict is: [[A]]', "A"),
        ('[[A]] or "[[B]]"', "A"),
        ('[[B]] at first. My final verdict is: "[[A]]"', "A"),
        ("[[C]]", "tie"),
        ("[A]", "error"),
        ("[[ B ]]", "B"),
        (r"[[A]] at first, then \[\[B\]\]", "B"),
        ("[[A]] at first, then [[B>>A]]", "error"),
        ("[[A]]\n\nNote: [[A]] if A is better, [[B]] if B is better, [[C]] for a tie.", "A"),
        ("", "error"),
        ("<think>[[A]]", "error"),
    ],
)
def test_the_last_statement_is_the_preference(reply, verdict):
    assert preference(reply) == (verdict, "unparsed" if verdict == "error" else "")


def test_fastchats_own_rule_takes_the_first():
    text = f"<think>{FORMAT}</think> Rating: [[9]]"
    assert (first_rating(text), first_rating("see [3]"), first_preference("[[B]], not [[A]]")) == (5, 3, "A")


@pytest.mark.parametrize(
    "piece",
    ["[[", "[", "9", "[[9", "<think>", "</think>", "<think></think>", '"</think>"', "rating: [", '[[A]]"', "\\["],
)
def test_a_long_reply_is_read_in_proportion_to_its_length(piece):
    """A pattern that goes back over what it has read would take minutes: 63 s for 60,000 digits."""
    text = (piece * 300_000)[:300_000]
    with within(20):
        rating(text), preference(text), first_rating(text)
