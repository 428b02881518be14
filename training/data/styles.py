"""How rows are put into words (``data.template``): as Anthropic HH's dialogue text, or
as messages for the tokenizer's own chat template. Standard library only.

training/data/rows.py tells a row's format by its fields, and calls a style for each prompt and
reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from training.data import conversation, dialogue, turns
from training.data.conversation import Conversation
from training.data.turns import BadRow, Unusable

Prompt = str | Conversation
"""What precedes a reply: HH's text, or messages."""
Reply = str | dict
"""A reply's text, or the assistant's message."""


class Style(Protocol):
    """What a row's prompts and replies become. A turn is what ``read`` gives for a message."""

    name: str

    def read(self, messages, field: str, last: str, opens: bool = True) -> list:
        """Turns of a list of messages, whose last one is ``last``'s. ``opens``: they begin a
        conversation. Raises BadRow and Unusable."""

    def role_and_text(self, turn) -> tuple[str, str]:
        """Who speaks, and what."""

    def prompt(self, text: str) -> Prompt:
        """A prompt that the row has as a text, for the project's own formats."""

    def question(self, text: str) -> Prompt:
        """A prompt that the row has as a text without a speaker's mark; TRL's formats."""

    def conversation(self, before: list, field: str) -> Prompt:
        """The prompt of the turns before a reply. Raises BadRow unless the last one asks."""

    def continued(self, text: str, turns: list, field: str) -> Prompt:
        """``question`` of ``text``, then ``turns``, the first of them the assistant's."""

    def reply(self, turn) -> Reply:
        """The reply that is the turn of a list of messages."""

    def reply_text(self, text: str) -> Reply:
        """The reply of a field with a text, for TRL's formats and HH."""

    def stored_reply(self, value, field: str) -> Reply:
        """The reply of a field ``response``, for the project's own formats."""

    def finished(self, row, fields: dict):
        """``row``, made of ``fields``. Raises Unusable for a row that would teach a model something
        false."""


class HHText:
    """Anthropic HH's dialogue text (training/data/dialogue.py), for tokenizers without a chat
    template."""

    name = "hh"

    def read(self, messages, field: str, last: str, opens: bool = True) -> turns.Turns:
        return turns.read(messages, field, last, opens)

    def role_and_text(self, turn: tuple[str, str]) -> tuple[str, str]:
        return turn

    def prompt(self, text: str) -> str:
        return text

    def question(self, text: str) -> str:
        return dialogue.as_prompt(text) if text.strip() else ""

    def conversation(self, before: turns.Turns, field: str) -> str:
        turns.check_order(before, field)
        if before[-1][0] != "user":
            raise BadRow(
                f"{field}[{len(before) - 1}].role: {before[-1][0]!r}: expected a user's message before the reply"
            )
        return dialogue.from_messages(before) + dialogue.CUE

    def continued(self, text: str, turns: turns.Turns, field: str) -> str:
        return dialogue.as_prompt(text) + self.conversation([("user", text), *turns], field).partition(dialogue.CUE)[2]

    def reply(self, turn: tuple[str, str]) -> str:
        return dialogue.as_reply(turn[1])

    def reply_text(self, text: str) -> str:
        return dialogue.as_reply(text)

    def stored_reply(self, value, field: str) -> str:
        return turns.string(value, field)

    def finished(self, row, fields: dict):
        row = _without_prompts(row)
        if not row.prompt.strip():
            raise Unusable("empty prompt")
        if not all(response.strip() for response in row.responses):
            raise Unusable("empty reply")
        check_distinct(row)
        if row.responses and dialogue.has_marker(row.best):
            raise Unusable("role marker inside the better reply")
        return row


class Chat:
    """Messages for the tokenizer's chat template. A text becomes a user's message; HH's dialogue
    text becomes its turns."""

    name = "chat"

    def __init__(self, special: Sequence[str] = (), arguments: dict | None = None, last_only: bool = False):
        """``special``: texts of the tokenizer's special tokens, which no reply may contain.
        ``arguments``: variables for the template in every row, ``data.chat_template_kwargs``.
        ``last_only``: earlier replies get the weight 0 (``data.assistant_turns``)."""
        self.special, self.arguments, self.last_only = tuple(special), dict(arguments or {}), last_only

    def read(self, messages, field: str, last: str, opens: bool = True) -> conversation.Messages:
        return conversation.read(messages, field, last)

    def role_and_text(self, turn: dict) -> tuple[str, str]:
        return turn["role"], conversation.text(turn)

    def prompt(self, text: str) -> Conversation:
        return Conversation(tuple(self._turns(text)))

    question = prompt

    def conversation(self, before: conversation.Messages, field: str) -> Conversation:
        if before[-1]["role"] == "assistant":
            raise BadRow(f"{field}[{len(before) - 1}].role: 'assistant': expected a user's message before the reply")
        return Conversation(tuple(before))

    def continued(self, text: str, turns: conversation.Messages, field: str) -> Conversation:
        return self.conversation([*self._turns(text), *turns], field)

    def reply(self, turn: dict) -> dict:
        return turn

    def reply_text(self, text: str) -> dict:
        return {"role": "assistant", "content": text.strip()}

    def stored_reply(self, value, field: str) -> dict:
        if isinstance(value, dict):
            return conversation.read([value], field, "assistant")[0]
        return self.reply_text(turns.string(value, field))

    def finished(self, row, fields: dict):
        arguments = dict(conversation.arguments(fields.get("chat_template_kwargs")))
        prompt = row.prompt._replace(
            tools=conversation.tools(fields.get("tools")), arguments=tuple((self.arguments | arguments).items())
        )
        if not any(conversation.text(turn).strip() for turn in prompt.messages):
            raise Unusable("empty prompt")
        if not all(conversation.text(reply).strip() for reply in row.responses):
            raise Unusable("empty reply")
        check_distinct(row)
        if row.responses and self._special_in(row.best):
            raise Unusable("special token inside the better reply")
        if self.last_only:
            unlearnt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt.messages]
            prompt = prompt._replace(messages=tuple(unlearnt))
        marked = any(self._special_in(turn) for turn in prompt.messages)
        return row._replace(prompt=prompt, notes=row.notes + ("special token inside a turn",) * marked)

    def _special_in(self, turn: dict) -> bool:
        text = conversation.text(turn)
        return any(token in text for token in self.special)

    @staticmethod
    def _turns(text: str) -> conversation.Messages:
        if not text.strip():
            return []
        return [
            {"role": role, "content": content} for role, content in dialogue.turns(text) or [("user", text.strip())]
        ]


def check_distinct(row) -> None:
    """Raises Unusable for a comparison with nothing to compare."""
    texts = [reply if isinstance(reply, str) else conversation.text(reply) for reply in row.responses]
    if len(texts) > 1 and (len(set(row.scores)) == 1 or len(set(texts)) == 1):
        raise Unusable("replies or their scores are equal")


def _without_prompts(row):
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
