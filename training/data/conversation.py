"""A chat as the tokenizer's own template takes it: messages with any field, tools, and more
variables for the template. Standard library only.

The template decides which roles it takes and in which order. This module checks what no template
can take, and brings the forms in which public data sets keep the same thing into one: parts of a
text are joined, a call's arguments that are JSON in a string become an object, and fields that are
null (Parquet gives each row all fields) are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from training.data.turns import BadRow, Unusable, short, string

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of roles that public sets use."""
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")
"""Fields of a row, besides its messages, that reach the template: TRL's names."""
Messages = list[dict]


class Conversation(NamedTuple):
    """The messages before a reply, and what else the template is given."""

    messages: tuple[dict, ...]
    tools: tuple[dict, ...] = ()
    arguments: tuple[tuple[str, object], ...] = ()
    """(name, value) of each further variable of the template, ``chat_template_kwargs``."""

    @property
    def key(self) -> str:
        """Text that tells this conversation from others."""
        return _key(self.messages)

    def earlier(self) -> list[str]:
        """Keys of the conversations that this one goes on from: up to each earlier reply."""
        replies = [at for at, message in enumerate(self.messages) if at and message["role"] == "assistant"]
        return [_key(self.messages[:at]) for at in replies]

    @property
    def question(self) -> str:
        """Text of the last user's turn."""
        turns = [message for message in self.messages if message["role"] == "user"]
        return text(turns[-1]).strip() if turns else ""

    def fields(self) -> dict:
        """The fields of a row that reach the template, those that are there."""
        values = {"tools": list(self.tools), "chat_template_kwargs": dict(self.arguments)}
        return {name: value for name, value in values.items() if value}


def text(message: Mapping) -> str:
    """What ``message`` says, a thought in a field of its own and calls included."""
    parts = [message.get(field) for field in ("reasoning_content", "content")]
    calls = message.get("tool_calls")
    calls = json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else None
    return "\n".join(filter(None, [*parts, calls]))


def read(messages, field: str, last: str) -> Messages:
    """The messages of a row's ``field``. ``last``: "assistant" or "user", whose the last one must
    be; a tool's result stands for a user's. Raises BadRow that names the message, and Unusable for
    an empty turn and for a reply of weight 0."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{field}: {short(messages)}: expected a list of messages")
    turns = [_message(message, f"{field}[{at}]") for at, message in enumerate(messages)]
    role = turns[-1]["role"]
    if role != last and not (last == "user" and role in ("tool", "function")):
        raise BadRow(f"{field}[{len(turns) - 1}].role: {role!r}: expected the last message to be the {last}'s")
    if any(not text(turn).strip() for turn in turns[:-1] if turn["role"] not in ("system", "developer", "tool")):
        raise Unusable("empty turn")
    if last == "assistant" and not is_learnt(turns[-1]):
        raise Unusable("reply with weight 0")
    return turns


def is_learnt(message: Mapping) -> bool:
    """OpenAI's format gives a reply that must not be learnt the weight 0."""
    return message.get("weight") not in (0, False)


def tools(value, field: str = "tools") -> tuple[dict, ...]:
    """JSON schemas of functions, from a list or from JSON in a string. Raises BadRow."""
    value = _parsed(value)
    if value is None or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(_parsed(tool), dict) for tool in value):
        raise BadRow(f"{field}: {short(value)}: expected a list of JSON schemas, or that list as a string of JSON")
    return tuple(_without_nulls(_parsed(tool)) for tool in value)


def arguments(value, field: str = "chat_template_kwargs") -> tuple[tuple[str, object], ...]:
    """Variables for the template. Raises BadRow where they are no object."""
    value = _parsed(value)
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise BadRow(f"{field}: {short(value)}: expected an object of names and values")
    return tuple(_without_nulls(value).items())


def _message(message, where: str) -> dict:
    if not isinstance(message, dict) or "role" not in message:
        raise BadRow(f'{where}: {short(message)}: expected {{"role", "content"}}')
    values = _without_nulls(message)
    role = values.get("role")
    if not isinstance(role, str) or not role:
        raise BadRow(f"{where}.role: {short(role)}: expected a text such as system, user, assistant or tool")
    values["role"] = ROLES.get(role, role)
    calls = values.get("tool_calls")
    if calls is not None:
        values["tool_calls"] = [_call(call, f"{where}.tool_calls[{at}]") for at, call in enumerate(_listed(calls))]
    if "content" not in values and not calls:
        raise BadRow(f"{where}.content: missing; expected the message's text")
    values["content"] = _content(values.get("content", ""), f"{where}.content")
    return values


def _content(value, where: str) -> str:
    """A text, or the joined texts of a list of parts."""
    if not isinstance(value, list):
        return string(value, where)
    for at, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow(f'{where}[{at}]: {short(part)}: expected {{"type": "text", "text"}}: only text is learnt')
    return string("".join(part["text"] for part in value), where)


def _call(call, where: str) -> dict:
    if not isinstance(call, dict):
        raise BadRow(f'{where}: {short(call)}: expected {{"function": {{"name", "arguments"}}}}')
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"{where}: {short(call)}: expected the function's name")
    if "arguments" in function:
        function = function | {"arguments": _parsed(function["arguments"])}
    return call | {"function": function} if "function" in call else function


def _listed(value) -> list:
    value = _parsed(value)
    return value if isinstance(value, list) else [value]


def _parsed(value):
    """``value``, or what it holds where it is the JSON of an object or a list in a string."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_nulls(value):
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _key(messages) -> str:
    return json.dumps([[message["role"], text(message)] for message in messages], ensure_ascii=False)
