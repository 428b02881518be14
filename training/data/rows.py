"""A JSON object -> a ``Row``: our three formats, Anthropic HH, TRL's (text or lists of messages)
and chat messages.

Every row, whatever its format, becomes a prompt with the replies to it, best first known by score.
Pure, stdlib only.
"""

from __future__ import annotations

import difflib
import functools
import sys
from typing import NamedTuple

from training.data import dialogue, turns
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

    prompt: str
    responses: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    """Unusual traits of a row that is used nevertheless."""

    @property
    def best(self) -> str:
        """The reply with the highest score, the first of equals."""
        return self.responses[self.scores.index(max(self.scores))]


def parse(row: dict) -> Row:
    """Parse a row, whose fields tell its format. Raises BadRow for a malformed row, Unusable for a
    well-formed one that must not be trained on."""
    if "chosen" in row or "rejected" in row:
        for field in ("chosen", "rejected"):
            if field not in row:
                raise BadRow(
                    f"{field}: missing, but {'rejected' if field == 'chosen' else 'chosen'} is there; expected both"
                )
        if any(_higher(row.get(rejected), row.get(chosen)) for chosen, rejected in JUDGED):
            raise Unusable("the rejected reply has the higher score")
        return _trl(row) if "prompt" in row or isinstance(row["chosen"], list) else _hh(row)
    if row.get("label") is False and any(isinstance(row.get(field), kind) for field, kind in SINGLE):
        raise Unusable("reply with label false")
    if "messages" in row:
        return _chat(row)
    prompt = "prompt" if "prompt" in row else "query"
    if "query" in row and row["query"] != row[prompt]:
        raise BadRow(
            f"query: {short(row['query'])}: another text than prompt's "
            f"{short(row[prompt])}; expected one of the two fields"
        )
    if prompt not in row:
        raise BadRow(f"prompt: missing; the fields are {', '.join(row) or 'none'}; expected {FORMATS}")
    if "completion" in row:
        return _completion(row, prompt)
    if "score" in row or isinstance(row.get("response"), list):
        return _comparison(row, prompt)
    if "response" in row:
        return _usable(Row(_text(row, prompt), (_text(row, "response"),), (0.0,)))
    for name in row:
        if near := _misspelt(name):
            raise BadRow(
                f"{name}: no field of any format, so that the row has a prompt and no reply; did you mean {near}? If "
                "not, give it another name"
            )
    return _usable(Row(_prompt(row, []) if isinstance(row[prompt], list) else _text(row, prompt)))


def _higher(one, two) -> bool:
    return all(type(score) in (int, float) for score in (one, two)) and one > two


@functools.lru_cache
def _misspelt(name: str) -> str:
    """The field of ``REPLIES`` that ``name`` is nearly, or ""."""
    return next(iter(difflib.get_close_matches(name, REPLIES, 1, 0.86)), "")


def unread(row: dict) -> list[str]:
    """Fields of a row with text in them, or lists, that ``parse`` does not read."""
    read = next((fields for fields in READ if fields[0] in row), ("prompt", "query"))
    return [name for name, value in row.items() if name not in read and isinstance(value, (str, list)) and value]


def _hh(row: dict) -> Row:
    sides = []
    for field in ("chosen", "rejected"):
        side = dialogue.split(_text(row, field))
        if side is None:
            raise BadRow(f"{field}: no turn begins with {dialogue.CUE!r}")
        sides.append(side)
    (prompt, chosen), (other, rejected) = sides
    if prompt != other:
        raise Unusable("prompts of chosen and rejected differ")
    return _preference(prompt, chosen, rejected)


def _trl(row: dict) -> Row:
    (earlier, chosen), (other, rejected) = (_reply(row, field) for field in ("chosen", "rejected"))
    if earlier != other:
        raise Unusable("prompts of chosen and rejected differ")
    if "prompt" not in row and not earlier:
        raise BadRow("prompt: missing, and chosen and rejected have no message before the reply")
    return _preference(_prompt(row, earlier), chosen, rejected)


def _completion(row: dict, prompt: str) -> Row:
    """TRL's prompt and completion; with "label" its unpaired preference."""
    earlier, reply = _reply(row, "completion")
    if type(row.get("label", True)) is not bool:
        raise BadRow(f"label: {short(row['label'])}: expected true or false")
    return _usable(Row(_prompt({"prompt": row[prompt]}, earlier), (reply,), (0.0,)))


def _reply(row: dict, field: str) -> tuple[turns.Turns, str]:
    """(turns before the reply, the reply) of a field that holds the reply's text, or messages that
    end with the reply."""
    if not isinstance(row[field], list):
        return [], dialogue.as_reply(_text(row, field))
    messages = turns.read(row[field], field, last="assistant", opens=False)
    return messages[:-1], dialogue.as_reply(messages[-1][1])


def _prompt(row: dict, earlier: turns.Turns) -> str:
    """The prompt of a TRL row: the field "prompt", if there is one, and the turns that precede the
    reply in its own field. These may repeat the prompt's conversation."""
    opening = row.get("prompt", [])
    if isinstance(opening, list):
        opening = turns.read(opening, "prompt", last="user") if "prompt" in row else []
        return _dialogue(
            earlier if earlier[: len(opening)] == opening else opening + earlier,
            "prompt and the turns before the reply",
        )
    text, first = _text(row, "prompt"), dialogue.as_prompt(_text(row, "prompt"))
    if not earlier or not text.strip():
        return first if text.strip() else ""
    if earlier[0][0] == "assistant":  # they go on from the prompt
        return (
            first
            + _dialogue([("user", text), *earlier], "prompt and the turns before the reply").partition(dialogue.CUE)[2]
        )
    conversation = _dialogue(earlier, "turns before the reply")
    if first != conversation and ("user", text.strip()) not in [(role, content.strip()) for role, content in earlier]:
        raise BadRow(
            f"prompt: {short(text)}: none of the messages before the reply; leave out the field, or the messages"
        )
    return conversation


def _dialogue(conversation: turns.Turns, field: str) -> str:
    """The dialogue text of a conversation, up to and including the cue. Raises BadRow unless its
    last turn is the user's."""
    turns.check_order(conversation, field)
    if conversation[-1][0] != "user":
        raise BadRow(
            f"{field}[{len(conversation) - 1}].role: {conversation[-1][0]!r}: "
            "expected a user's message before the reply"
        )
    return dialogue.from_messages(conversation) + dialogue.CUE


def _preference(prompt: str, chosen: str, rejected: str) -> Row:
    return _usable(Row(prompt, (chosen, rejected), (1.0, 0.0)))


def _chat(row: dict) -> Row:
    *before, (_, reply) = turns.read(row["messages"], "messages", last="assistant")
    return _usable(Row(_dialogue(before, "messages"), (dialogue.as_reply(reply),), (0.0,)))


def _comparison(row: dict, prompt: str) -> Row:
    responses, scores = (row.get(field) for field in ("response", "score"))
    if not isinstance(responses, list):
        raise BadRow(f"response: {short(responses)}: expected a list of strings")
    responses = [string(response, f"response[{at}]") for at, response in enumerate(responses)]
    if not isinstance(scores, list) or not all(
        type(s) in (int, float) and abs(s) <= sys.float_info.max for s in scores
    ):
        raise BadRow(f"score: {short(scores)}: expected a list of finite numbers")
    if len(responses) < 2 or len(responses) != len(scores):
        raise BadRow(f"score: {len(scores)} scores for {len(responses)} responses; expected one each and at least 2")
    return _usable(Row(_text(row, prompt), tuple(responses), tuple(map(float, scores))))


def _without_prompts(row: Row) -> Row:
    """Cut the prompt off replies that begin with it. Only prompts with role marks count, because
    these leave no doubt."""
    prompt = row.prompt.strip()
    if dialogue.HUMAN.strip() not in prompt or not prompt.endswith(dialogue.CUE.strip()):
        return row
    replies = [reply.strip() for reply in row.responses]
    if not any(reply.startswith(prompt) for reply in replies):
        return row
    return row._replace(
        responses=tuple(dialogue.as_reply(reply.removeprefix(prompt)) for reply in replies),
        notes=("prompt cut from the replies that began with it",),
    )


def _usable(row: Row) -> Row:
    """``row``, with prompts cut off its replies. Raises Unusable for a row that would teach a model
    something false."""
    row = _without_prompts(row)
    if not row.prompt.strip():
        raise Unusable("empty prompt")
    if not all(response.strip() for response in row.responses):
        raise Unusable("empty reply")
    if len(row.responses) > 1 and (len(set(row.scores)) == 1 or len(set(row.responses)) == 1):
        raise Unusable("replies or their scores are equal")
    if row.responses and dialogue.has_marker(row.best):
        raise Unusable("role marker inside the better reply")
    return row


def _text(row: dict, field: str) -> str:
    return string(row[field], field)
