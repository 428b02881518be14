"""Chat messages -> (role, content) turns whose order is checked. Pure, stdlib only.

One system message may stand first; then user and assistant speak in turn, the user first. A list
that continues a prompt may begin with the assistant. Another order is an error that names the
message: dialogue text has no place for it, and joined turns would mix speakers. An empty turn
before the reply makes its row unusable. An empty system message is ignored.
"""

from __future__ import annotations

import re

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
CALLS = ("tool_calls", "function_call")
"""Fields of a message that add to its content: without them it would be another message."""
Turns = list[tuple[str, str]]
_SURROGATE = re.compile("[\ud800-\udfff]")


class BadRow(ValueError):
    """A malformed row: the message names the field. ``iterate`` adds file and line."""


class Unusable(ValueError):
    """A well-formed row that training must not see; the message is the reason that is counted."""


def read(messages, field: str, last: str, opens: bool = True) -> Turns:
    """The turns of ``messages``, the value of ``field``. ``last``: whose the last one must be.
    ``opens``: they begin a conversation, so the user speaks first. Raises BadRow and Unusable, the
    latter for a reply of weight 0, too: OpenAI's format says so of one that must not be learnt."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{field}: {short(messages)}: expected a list of messages")
    turns = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadRow(f'{field}[{at}]: {short(message)}: expected {{"role", "content"}}')
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"{field}[{at}].role: {short(role)}: expected system, user or assistant")
        for name in CALLS:
            if message.get(name):
                raise BadRow(
                    f"{field}[{at}].{name}: {short(message[name])}: a tool's call has no place in dialogue text; "
                    "leave the conversation out, or write the call into the content"
                )
        turns.append((ROLES[role], string(message["content"], f"{field}[{at}].content")))
    if turns[-1][0] != last:
        raise BadRow(f"{field}[{len(turns) - 1}].role: {turns[-1][0]!r}: expected the last message to be the {last}'s")
    check_order(turns, field, opens)
    if last == "assistant" and messages[-1].get("weight") in (0, False):
        raise Unusable("reply with weight 0")
    return turns


def check_order(turns: Turns, field: str, opens: bool = True) -> None:
    """BadRow where ``turns`` stand in another order than this module's. Unusable for an empty one
    before the last."""
    before = "system" if opens else ""
    for at, (role, content) in enumerate(turns):
        if role == "system" and at:
            raise BadRow(
                f"{field}[{at}].role: 'system': expected only as the first message; "
                "put its text there, or into a user's"
            )
        if role == before and at:
            raise BadRow(
                f"{field}[{at}].role: {role!r} follows another {role!r}: expected user and assistant in turn; "
                "join the two messages, or give the reply that is missing between them"
            )
        if role == "assistant" and before == "system":
            raise BadRow(f"{field}[{at}].role: 'assistant': expected a user's message before it")
        if at < len(turns) - 1 and role != "system" and not content.strip():
            raise Unusable("empty turn")
        before = role


def string(value, where: str) -> str:
    """``value``, which must be text; BadRow that names ``where`` it stands."""
    if not isinstance(value, str):
        raise BadRow(f"{where}: {short(value)}: expected a string")
    if _SURROGATE.search(value):
        raise BadRow(f"{where}: {short(value)}: half of a surrogate pair is no character")
    return value


def short(value) -> str:
    """``value`` for an error's text."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
