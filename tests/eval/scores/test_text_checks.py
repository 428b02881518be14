"""Gold scores and generation checks against cases worked out by hand."""

import pytest

from eval.answers.rubric import contains, gold
from eval.scores.text_checks import Text, check, distinct, has_role_marker, repeated_share

RUBRIC = {"must": ["blue", "rayleigh scattering"], "must_not": ["idiot", "shut up"], "max_words": 6}


@pytest.mark.parametrize(
    "response, expected",
    [
        (" Blue, by Rayleigh scattering.", 1.0),
        (" Blue, by RAYLEIGH\n scattering, as many books on light say.", 0.8),  # too long
        (" Blue, by Rayleigh scattering, idiot.", 0.8),  # rude
        (" Blue, by Rayleigh scattering, you idiot, so now shut up.", 0.6),  # both
        (" Blue.", 0.4),  # one of two must phrases
        (" Bluebell rayleigh scattering", 0.4),  # no whole word
        (" The idiots blue", 0.4),
        ("", 0.0),
        (" \n", 0.0),
    ],
)
def test_gold(response, expected):
    assert gold(response, RUBRIC) == expected


def test_the_word_limit_is_inclusive():
    rubric = {"must": [], "must_not": [], "max_words": 3}
    assert gold("one two three", rubric) == 1.0 and gold("one two three four", rubric) == 0.8


@pytest.mark.parametrize(
    "text, phrase, found",
    [
        ("it costs 3.5 euros", "3.5", True),
        ("it costs 325 euros", "3.5", False),
        ("C++ is old", "c++", True),
        ("x-ray", "ray", True),
        ("Größe zählt", "größe", True),
        ("a_b", "b", False),
        ("", "b", False),
    ],
)
def test_phrases_match_whole_words_literally(text, phrase, found):
    assert contains(text, phrase) is found


def test_repetition_and_diversity():
    # abcd bcda cdab dabc abcd: one of five came before
    assert repeated_share("a b c d a b c d") == pytest.approx(1 / 5)
    assert repeated_share("a a a a a a") == pytest.approx(2 / 3)
    assert repeated_share("a b c") == 0
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct([""], 1) == 0


@pytest.mark.parametrize(
    "text, finish, marked",
    [
        ("fine", "eos", False),
        ("fine", "stop", True),
        ("ok\nHuman: and you?", "length", True),
        ("ok\n\n Assistant: yes", "eos", True),
        ("Human: hi", "eos", True),
        ("a Human: is a word", "eos", False),
        ("Human rights", "eos", False),
    ],
)
def test_role_markers(text, finish, marked):
    assert has_role_marker(Text(text, 1, finish)) is marked


def test_check_counts_shares_and_means():
    found = check([Text("a b c d", 5, "eos"), Text(" ", 1, "eos"), Text("a b", 8, "length"), Text("c", 3, "stop")])
    assert found == {
        "texts": 4,
        "empty": 0.25,
        "truncated": 0.25,
        "eos_rate": 0.5,
        "role_markers": 0.25,
        "repeated_ngrams": 0.0,
        "distinct_1": 4 / 7,
        "distinct_2": 3 / 4,
        "words": 7 / 4,
        "tokens": 17 / 4,
    }
