"""Anthropic HH's dialogue text: ``"\\n\\nHuman: ...\\n\\nAssistant:"``, then a reply that begins
with one space. Pure, stdlib
only."""

from __future__ import annotations

import re

HUMAN = "\n\nHuman:"
CUE = "\n\nAssistant:"
"""What every prompt ends with; no space after it, because the reply brings its own."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_MARKER = re.compile(r"(?<!\w)(?:Human|Assistant):")
_SPEAKERS = {"user": HUMAN, "human": HUMAN, "assistant": CUE}


def as_prompt(question: str) -> str:
    """The dialogue text of ``question``. A text that already is a dialogue only gets the cue at its
    end."""
    text = question.rstrip()
    if text.endswith(CUE.strip()) and HUMAN in text:
        return text
    return (text if text.startswith(HUMAN) else f"{HUMAN} {text.strip()}") + CUE


def as_reply(text: str) -> str:
    """``text`` with the one leading space of HH; "" if there is nothing but white space."""
    return f" {text.strip()}" if text.strip() else ""


def split(dialogue: str) -> tuple[str, str] | None:
    """(prompt, reply): the prompt reaches up to and including the last cue. None where there is no
    cue."""
    head, cue, reply = dialogue.rpartition(CUE)
    return (head + cue, as_reply(reply)) if cue else None


def from_messages(messages: list[tuple[str, str]]) -> str:
    """Dialogue text of (role, content) turns; a system turn is put in front of the next turn's own
    words.

    Raises KeyError for a role that HH has no speaker for.
    """
    text, system = "", ""
    for role, content in messages:
        if role == "system":
            system += f"{content.strip()}\n" if content.strip() else ""
            continue
        text += f"{_SPEAKERS[role]} {system}{content.strip()}"
        system = ""
    return text


def turns(text: str) -> list[tuple[str, str]]:
    """(role, content) of each turn of a dialogue; [] for a text that is none. Turns of one speaker
    in a row are joined, and a cue at the end is left out."""
    if not text.lstrip().startswith(HUMAN.strip()):
        return []
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    joined: list[tuple[str, str]] = []
    for speaker, content in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if joined and joined[-1][0] == role:
            content = f"{joined.pop()[1]}\n\n{content.strip()}"
        joined.append((role, content.strip()))
    return joined[:-1] if joined[-1] == ("assistant", "") else joined


def earlier(prompt: str) -> list[str]:
    """The prompts that ``prompt`` goes on from: its dialogue up to each cue but the last."""
    ends = [match.end() for match in re.finditer(re.escape(CUE), prompt)]
    return [prompt[:end] for end in ends if end < len(prompt.rstrip())]


def question(prompt: str) -> str:
    """Text of the prompt's last human turn; of a prompt without role marks, all of its text."""
    return prompt.rpartition(HUMAN)[2].strip().removesuffix(CUE.strip()).strip()


def has_marker(text: str) -> bool:
    """True if ``text`` contains a speaker's mark, as where a turn includes the next by mistake."""
    return _MARKER.search(text) is not None


def oddities(prompt: str) -> list[str]:
    """Unusual traits of a prompt that is used nevertheless, e.g. two turns of one speaker in a
    row."""
    speakers = _TURN.findall(prompt)
    reasons = []
    if any(one == two for one, two in zip(speakers, speakers[1:], strict=False)):
        reasons.append("speakers do not alternate")
    if any(has_marker(turn) for turn in _TURN.split(prompt)[2::2]):
        reasons.append("role marker inside a turn")
    return reasons
