"""A JSON object -> a ``Row``: our three formats, Anthropic HH, TRL's (text or lists of messages)
and chat messages.

Every row, whatever its format, becomes a prompt with the replies to it, best first known by score.
training/data/styles.py puts them into words. Pure, stdlib only.
"""

from __future__ import annotations

import difflib
import functools
import sys
from typing import NamedTuple

from training.data import dialogue
from training.data.conversation import TEMPLATE_FIELDS, text
from training.data.styles import HHText, Prompt, Reply, Style
from training.data.turns import BadRow, Unusable, short, string

COMPARISONS = (
    'Anthropic HH {"chosen", "rejected"}, TRL {"prompt", "chosen", "rejected"} '
    'or {"query", "response": [...], "score": [...]}'
)
FORMATS = f'{{"prompt", "response"}}, TRL {{"prompt", "completion"}}, {{"messages"}}, {COMPARISONS}'
REPLIES = ("response", "completion", "chosen", "rejected", "messages")
"""Fields that hold a reply to a prompt. A field with nearly such a name is taken for a
misspelling."""
READ = (
    ("chosen", "rejected", "prompt"),
    ("messages",),
    ("completion", "prompt", "query", "label"),
    ("response", "prompt", "query", "score"),
)
"""Fields of each format. A row that has the first field is of that format."""

SINGLE = (("completion", (str, list)), ("response", str), ("messages", list))
"""Fields with one reply, and their types. With label = false the reply is bad, and there is none to
compare it with."""
JUDGED = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
)
"""What public sets of pairs call the scores of their two replies."""


class Row(NamedTuple):
    """One prompt and the replies to it: none (RLHF), one (SFT) or several (comparisons)."""

    prompt: Prompt
    responses: tuple[Reply, ...] = ()
    scores: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    """Unusual traits of a row that is used nevertheless."""

    @property
    def best(self) -> Reply:
        """The reply with the highest score, the first of equals."""
        return self.responses[self.scores.index(max(self.scores))]

    @property
    def key(self) -> str:
        """Text that tells the prompt from others."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt.key

    @property
    def question(self) -> str:
        """Text of the prompt's last human turn."""
        return dialogue.question(self.prompt) if isinstance(self.prompt, str) else self.prompt.question

    @property
    def texts(self) -> list[str]:
        """Texts of the replies."""
        return [reply if isinstance(reply, str) else text(reply) for reply in self.responses]

    def earlier(self) -> list[str]:
        """Keys of the prompts that this one goes on from."""
        return dialogue.earlier(self.prompt) if isinstance(self.prompt, str) else self.prompt.earlier()

    def oddities(self) -> list[str]:
        """Unusual traits, the prompt's included."""
        return [*(dialogue.oddities(self.prompt) if isinstance(self.prompt, str) else ()), *self.notes]

    def as_native(self, stage: str) -> dict:
        """The JSON object of ``stage``'s prepared file (rlhf.md, section 2)."""
        if isinstance(self.prompt, str):
            if stage == "reward":
                return {"query": self.prompt, "response": list(self.responses), "score": list(self.scores)}
            return {"prompt": self.prompt} | ({"response": self.best} if stage == "sft" else {})
        messages, fields = list(self.prompt.messages), self.prompt.fields()
        if stage == "sft":
            return {"messages": [*messages, self.best]} | fields
        replies = {"response": list(self.responses), "score": list(self.scores)} if stage == "reward" else {}
        return {"prompt": messages} | replies | fields


HH_TEXT = HHText()


def parse(row: dict, style: Style = HH_TEXT) -> Row:
    """Parse a row, whose fields tell its format, into the words of ``style``. Raises BadRow for a
    malformed row, Unusable for a well-formed one that must not be trained on."""
    return style.finished(_parsed(row, style), row)


def _parsed(row: dict, style: Style) -> Row:
    if "chosen" in row or "rejected" in row:
        for field in ("chosen", "rejected"):
            if field not in row:
                raise BadRow(
                    f"{field}: missing, but {'rejected' if field == 'chosen' else 'chosen'} is there; expected both"
                )
        if any(_higher(row.get(rejected), row.get(chosen)) for chosen, rejected in JUDGED):
            raise Unusable("the rejected reply has the higher score")
        return _trl(row, style) if "prompt" in row or isinstance(row["chosen"], list) else _hh(row, style)
    if row.get("label") is False and any(isinstance(row.get(field), kind) for field, kind in SINGLE):
        raise Unusable("reply with label false")
    if "messages" in row:
        *before, reply = style.read(row["messages"], "messages", last="assistant")
        return Row(_conversation(before, "messages", style), (style.reply(reply),), (0.0,))
    prompt = "prompt" if "prompt" in row else "query"
    if "query" in row and row["query"] != row[prompt]:
        raise BadRow(
            f"query: {short(row['query'])}: another text than prompt's "
            f"{short(row[prompt])}; expected one of the two fields"
        )
    if prompt not in row:
        raise BadRow(f"prompt: missing; the fields are {', '.join(row) or 'none'}; expected {FORMATS}")
    if "completion" in row:
        return _completion(row, prompt, style)
    if "score" in row or isinstance(row.get("response"), list):
        return _comparison(row, prompt, style)
    if "response" in row:
        return Row(_native_prompt(row, prompt, style), (style.stored_reply(row["response"], "response"),), (0.0,))
    for name in row:
        if near := _misspelt(name):
            raise BadRow(
                f"{name}: no field of any format, so that the row has a prompt and no reply; did you mean {near}? If "
                "not, give it another name"
            )
    return Row(_native_prompt(row, prompt, style))


def _higher(one, two) -> bool:
    return all(type(score) in (int, float) for score in (one, two)) and one > two


@functools.lru_cache
def _misspelt(name: str) -> str:
    """The field of ``REPLIES`` that ``name`` is nearly, or ""."""
    return next(iter(difflib.get_close_matches(name, REPLIES, 1, 0.86)), "")


def unread(row: dict, style: Style = HH_TEXT) -> list[str]:
    """Fields of a row with text in them, or lists, that ``parse`` does not read."""
    read = next((fields for fields in READ if fields[0] in row), ("prompt", "query"))
    read += TEMPLATE_FIELDS if style.name == "chat" else ()
    return [name for name, value in row.items() if name not in read and isinstance(value, (str, list)) and value]


def _hh(row: dict, style: Style) -> Row:
    sides = []
    for field in ("chosen", "rejected"):
        side = dialogue.split(_text(row, field))
        if side is None:
            raise BadRow(f"{field}: no turn begins with {dialogue.CUE!r}")
        sides.append(side)
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Unusable("prompts of chosen and rejected differ")
    return Row(style.prompt(prompt), (style.reply_text(chosen), style.reply_text(rejected)), (1.0, 0.0))


def _trl(row: dict, style: Style) -> Row:
    (earlier, chosen), (other, rejected) = (_reply(row, field, style) for field in ("chosen", "rejected"))
    if earlier != other:
        raise Unusable("prompts of chosen and rejected differ")
    if "prompt" not in row and not earlier:
        raise BadRow("prompt: missing, and chosen and rejected have no message before the reply")
    return Row(_prompt(row, earlier, style), (chosen, rejected), (1.0, 0.0))


def _completion(row: dict, prompt: str, style: Style) -> Row:
    """TRL's prompt and completion; with "label" its unpaired preference."""
    earlier, reply = _reply(row, "completion", style)
    if type(row.get("label", True)) is not bool:
        raise BadRow(f"label: {short(row['label'])}: expected true or false")
    return Row(_prompt({"prompt": row[prompt]}, earlier, style), (reply,), (0.0,))


def _reply(row: dict, field: str, style: Style) -> tuple[list, Reply]:
    """(turns before the reply, the reply) of a field that holds the reply's text, or messages that
    end with the reply."""
    if not isinstance(row[field], list):
        return [], style.reply_text(_text(row, field))
    *earlier, reply = style.read(row[field], field, last="assistant", opens=False)
    return earlier, style.reply(reply)


def _native_prompt(row: dict, field: str, style: Style) -> Prompt:
    """The prompt of a row of ours: messages, or text as it is."""
    return _prompt(row, [], style) if isinstance(row[field], list) else style.prompt(_text(row, field))


def _prompt(row: dict, earlier: list, style: Style) -> Prompt:
    """The prompt of a TRL row: the field "prompt", if there is one, and the turns that precede the
    reply in its own field. These may repeat the prompt's conversation."""
    opening, where = row.get("prompt", []), "prompt and the turns before the reply"
    if isinstance(opening, list):
        opening = style.read(opening, "prompt", last="user") if "prompt" in row else []
        return _conversation(earlier if earlier[: len(opening)] == opening else opening + earlier, where, style)
    prompt = _text(row, "prompt")
    if not earlier or not prompt.strip():
        return style.question(prompt)
    spoken = [style.role_and_text(turn) for turn in earlier]
    if spoken[0][0] == "assistant":  # they go on from the prompt
        return style.continued(prompt, earlier, where)
    conversation = style.conversation(earlier, "turns before the reply")
    earlier_turns = [(role, content.strip()) for role, content in spoken]
    if style.question(prompt) != conversation and ("user", prompt.strip()) not in earlier_turns:
        raise BadRow(
            f"prompt: {short(prompt)}: none of the messages before the reply; leave out the field, or the messages"
        )
    return conversation


def _conversation(before: list, field: str, style: Style) -> Prompt:
    if not before:
        raise BadRow(f"{field}[0].role: 'assistant': expected a user's message before it")
    return style.conversation(before, field)


def _comparison(row: dict, prompt: str, style: Style) -> Row:
    responses, scores = (row.get(field) for field in ("response", "score"))
    if not isinstance(responses, list):
        raise BadRow(f"response: {short(responses)}: expected a list of strings")
    responses = [style.stored_reply(response, f"response[{at}]") for at, response in enumerate(responses)]
    if not isinstance(scores, list) or not all(
        type(s) in (int, float) and abs(s) <= sys.float_info.max for s in scores
    ):
        raise BadRow(f"score: {short(scores)}: expected a list of finite numbers")
    if len(responses) < 2 or len(responses) != len(scores):
        raise BadRow(f"score: {len(scores)} scores for {len(responses)} responses; expected one each and at least 2")
    return Row(_native_prompt(row, prompt, style), tuple(responses), tuple(map(float, scores)))


def _text(row: dict, field: str) -> str:
    return string(row[field], field)
