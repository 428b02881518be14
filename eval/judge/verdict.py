"""What a judge's reply says: its last statement after its thoughts, or why there is none. Pure.

MT-Bench's own rule takes the first mark anywhere (``first_rating``, ``first_preference``); the
scores in FastChat's files follow it. A judge that thinks aloud quotes the format and weighs
marks before it gives its own, so ours reads the reply's end. All patterns are linear in the
length of the reply.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNPARSED = -1
"""FastChat's score for a rating that is none; its tools leave such rows out."""
ERROR = "error"
"""FastChat's winner for a comparison without a verdict."""
REASONS = ("unparsed", "cut", "refused")
"""Why a reply is no verdict: no mark in it, cut at the limit of tokens, refused by the judge."""
_LONGEST = 20
"""Characters of a number that may be a rating: longer ones are none, and some are no float."""
_NUMBER = r"(\d+(?:\.\d*)?)"
_DOUBLE, _SINGLE = re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]")
_OPENED, _CLOSED = r"\\?\[\\?\[[ \t]{0,4}", r"[ \t]{0,4}\\?\]\\?\]"
"""Brackets of a mark, as they are or escaped for Markdown."""
_RATING = re.compile(rf"{_OPENED}([-+−]?\d[^\[\]\\\n]{{0,100}}?){_CLOSED}")
"""What stands where a rating belongs, be it one (7, 8/10) or none (-5, 1e3)."""
_RANGE = re.compile(
    rf"(?:\bout of|/)[ ]?{_OPENED}10{_CLOSED}"
    rf"|{_OPENED}1{_CLOSED}[ ]?(?:to|through|-|–)[ ]?{_OPENED}10{_CLOSED}"
)
"""The scale in a rating's own brackets."""
_LABELLED = re.compile(rf"(?:rating|score|评分)[^\w\[\n]{{0,8}}\[{_NUMBER}\]", re.IGNORECASE)
_LETTER = re.compile(rf"{_OPENED}([ABC](?:[<>=]{{1,3}}[ABC])?){_CLOSED}")
_FORM = re.compile(r"""[\s"'`”’»,]{0,3}(?:if\b|for a tie)""")
"""What stands behind a letter where the form of the answer is said again."""
_LETTERS = {"A": "A", "B": "B", "C": "tie"}
_QUOTES = "\"'`“”‘’«»"
_LED_TO = re.compile(
    rf"(?:verdict|rating|score|answer|choice|decision)[^\w\[\n]{{0,4}}(?:is|would be)?[^\w\[\n]{{0,4}}"
    rf"[{_QUOTES}]$",
    re.IGNORECASE,
)
_TAG = r"(?:[a-z]{1,9}:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|thought_process)"
_OPEN = re.compile(
    rf"<{_TAG}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel\|>analysis", re.IGNORECASE
)
_CLOSE = re.compile(
    rf"</{_TAG}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|"
    r"<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
_BARE_CHANNEL = "assistantfinal"
"""What is left of gpt-oss's channels where a server drops their special tokens:
analysis...assistantfinal..."""


class Verdict(NamedTuple):
    value: float | str
    """A rating, UNPARSED; or a comparison's "A", "B", "tie", ERROR."""
    reason: str
    """"" for a verdict, else one of REASONS."""


def rating(reply: str, finish: str = "stop") -> Verdict:
    """The last ``[[n]]`` or ``[[n/10]]`` that is not in quotation marks, else the last quoted one.
    Where something else stands last in its brackets, as [[-5]], there is no rating: an earlier
    mark was not the last word. The scale's ends, [[1]] to [[10]], are no marks.

    Without any, a single ``[n]`` counts where "Rating:" stands before it or the reply ends with
    it: an index in quoted code is no rating. A reply that was cut (``finish`` "length") says
    nothing: what stands last is not what would have been said last.
    """
    if problem := _no_statement(finish):
        return Verdict(UNPARSED, problem)
    text = _RANGE.sub("", without_thoughts(reply))
    mark = _last_unquoted(_RATING, text) or _last(_LABELLED, text) or _at_end(text)
    value = UNPARSED if mark is None else number(mark)
    return Verdict(value, "unparsed" if value == UNPARSED else "")


def preference(reply: str, finish: str = "stop") -> Verdict:
    """The last ``[[A]]``, ``[[B]]`` or ``[[C]]`` that is not in quotation marks, else the last one.
    A comparison of another form, as [[A>>B]], is no verdict; a letter with "if" behind it is
    none."""
    if problem := _no_statement(finish):
        return Verdict(ERROR, problem)
    mark = _last_unquoted(_LETTER, without_thoughts(reply))
    return Verdict(_LETTERS[mark], "") if mark in _LETTERS else Verdict(ERROR, "unparsed")


def first_rating(judgment: str) -> float:
    """FastChat's rule: the first ``[[n]]``, else the first ``[n]``; -1 where there is none."""
    match = _DOUBLE.search(judgment) or _SINGLE.search(judgment)
    return number(match[1]) if match else UNPARSED


def first_preference(judgment: str) -> str:
    """FastChat's rule: [[A]] counts before [[B]] before [[C]], wherever they stand."""
    return next((verdict for letter, verdict in _LETTERS.items() if f"[[{letter}]]" in judgment), ERROR)


def number(text: str) -> float:
    """The digits of a mark as a number, of n/10 n; UNPARSED for what is none, or is too long to be
    a rating."""
    text = text.removesuffix("/10")
    if len(text) > _LONGEST or not re.fullmatch(_NUMBER, text):
        return UNPARSED
    return float(text) if "." in text else int(text)


def without_thoughts(reply: str) -> str:
    """What a reply says once its thoughts are over; "" where they are not.

    Thoughts stand between tags of their own. A server may have dropped the opening tag, and
    some drop both. A tag in quotation marks is one that the judge writes about.
    """
    tags = [(match, True) for match in _tags(_OPEN, reply)] + [(match, False) for match in _tags(_CLOSE, reply)]
    parts, start, begin = [], 0, None
    for match, opens in sorted(tags, key=lambda tag: tag[0].start()):
        if opens:
            begin = begin or match
        elif begin:
            parts.append(reply[start : begin.start()])
            start, begin = match.end(), None
        else:  # its opening tag stood in the prompt: all that came before were thoughts
            parts, start = [], match.end()
    if begin and not "".join([*parts, reply[start : begin.start()]]).strip():
        return ""  # it began to think and never came to an end
    outside = "".join([*parts, reply[start:]])
    return outside.rpartition(_BARE_CHANNEL)[2] if outside.startswith("analysis") else outside


def _tags(pattern: re.Pattern, text: str) -> list[re.Match]:
    return [match for match in pattern.finditer(text) if not _quoted(text, match)]


def _quoted(text: str, match: re.Match) -> bool:
    """Does a quotation mark stand right before and right after?"""
    before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
    return before in tuple(_QUOTES) and after in tuple(_QUOTES)


def _no_statement(finish: str) -> str:
    return {"length": "cut", "refused": "refused"}.get(finish, "")


def _last(pattern: re.Pattern, text: str) -> str | None:
    mark = None
    for match in pattern.finditer(text):
        mark = match[1]
    return mark


def _last_unquoted(pattern: re.Pattern, text: str) -> str | None:
    """The last mark, except for one in quotation marks after one that is not.

    A mark is quoted where a quotation mark closes behind it. The quoted mark of 'my verdict is
    "[[A]]"' is a statement all the same.
    """
    last = quoted = None
    for match in pattern.finditer(text):
        before, after = (
            text[max(0, match.start() - 40) : match.start()],
            text[match.end() : match.end() + 2].lstrip("."),
        )
        form = _FORM.match(text, match.end()) and pattern is _LETTER
        if form or after[:1] in tuple(_QUOTES) and not _LED_TO.search(before):
            quoted = match[1]
        else:
            last = match[1]
    return last or quoted


def _at_end(text: str) -> str | None:
    """A single mark with nothing but punctuation behind it."""
    tail = text.rstrip(" \t\r\n.*_!)")[-_LONGEST - 2 :]
    match = re.search(rf"(?<![\w\]]){_SINGLE.pattern}$", tail)
    return match[1] if match else None
