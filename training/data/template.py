"""Conversations -> token ids by the tokenizer's own chat template, and which of them are learnt.

Ids are those of transformers' ``apply_chat_template``: the whole conversation is rendered and
tokenised once, without a BOS of the tokenizer's own. What the assistant says is found by the
template's ``{% generation %}`` blocks; without them by prefixes, as TRL's ``assistant_only_loss``
has it: a conversation must begin with its beginning, rendered with the assistant's mark. The end of
a turn is learnt with the turn.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from training.config.data import DataConfig
from training.data import formats
from training.data.conversation import Conversation, is_learnt
from training.data.rows import Row
from training.data.styles import Chat
from training.data.tokenised import RowTokenizer, TextTokenizer, Tokenised
from training.data.tokenizer import Tokenizer
from training.data.turns import BadRow
from training.errors import ConfigError
from training.files import chat_template, hf_folder
from training.files.chat_template import Rendered, Request, TemplateError

USER, ASSISTANT = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
SEVERAL_TURNS = (
    'set data.assistant_turns = "last", so that only a conversation\'s last reply is learnt, or give the template '
    "{% generation %} blocks"
)


class _Turn(NamedTuple):
    """An earlier turn of the assistant that is learnt."""

    index: int
    """Its message."""
    before: Rendered | TemplateError
    """The messages before it, with the assistant's mark."""
    through: Rendered | TemplateError
    """The messages up to and including it."""


class _Text(NamedTuple):
    """A rendered conversation and its ids."""

    rendered: Rendered
    ids: list[int]
    starts: list[int]
    """The character that each id begins at."""


@dataclass(frozen=True)
class ChatTemplate:
    """A folder's chat template with its tokenizer. ``read`` makes one."""

    tokenizer: Tokenizer
    template: str
    tokens: dict[str, str]
    """"bos_token", "eos_token", ... -> text."""
    arguments: dict = field(default_factory=dict)
    """Variables for the template in every row (``data.chat_template_kwargs``)."""
    last_only: bool = False
    """Learn a conversation's last reply alone (``data.assistant_turns``)."""
    name = "chat"

    @classmethod
    def read(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of the tokenizer's folder; None where it has none. Raises ConfigError for
        damaged files."""
        template, tokens = _choose(tokenizer.file.parent)
        return cls(tokenizer, template, tokens) if template else None

    @functools.cached_property
    def turn_end(self) -> int | None:
        """Id that the template writes behind a reply; None where that is no token of its own.
        Raises ConfigError for a template that can't render a question and its reply."""
        folder = self.tokenizer.file.parent
        try:
            request = Request([USER, ASSISTANT], cue=False)
            text = next(chat_template.render_all(self.template, [request], self.tokens)).text
        except TemplateError as error:
            raise ConfigError(f"model.checkpoint: {folder}: {error}; {TEXT_FIX}") from None
        if USER["content"] not in text or ASSISTANT["content"] not in text:
            raise ConfigError(
                f"model.checkpoint: {folder}: the chat template leaves out a question or its reply: it makes "
                f"{hf_folder.shown(repr(text), 160)} of {[USER, ASSISTANT]}; {TEXT_FIX}"
            )
        (encoding,) = self.tokenizer.encodings([text])
        after = text.rindex(ASSISTANT["content"]) + 1
        behind = (number for number, (at, _) in zip(encoding.ids, encoding.offsets, strict=True) if at >= after)
        return next((number for number in behind if number in self.tokenizer.added), None)

    @functools.cached_property
    def bos(self) -> list[int]:
        """Ids that a conversation may begin with and keeps when its head is cut."""
        bos = self.tokenizer.number(self.tokens.get("bos_token", ""))
        return self.tokenizer.bos if bos is None else [bos]

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: the turn's end, and those of the folder's files."""
        own = () if self.turn_end is None else (self.turn_end,)
        return tuple(dict.fromkeys((*own, *self.tokenizer.stop_ids)))

    @functools.cached_property
    def cue(self) -> int:
        """Ids of the assistant's mark, and of a BOS."""
        requests = [Request([USER], cue=True), Request([USER], cue=False)]
        with_cue, without = chat_template.render_all(self.template, requests, self.tokens)
        ids, rest = (encoding.ids for encoding in self.tokenizer.encodings([with_cue.text, without.text]))
        return len(ids) - len(commonprefix([ids, rest])) + len(self.bos)

    @property
    def digest(self) -> list:
        """What a conversation's ids depend on, in addition to the tokenizer and the row."""
        return [self.template, self.tokens, *self.tokenizer.stop_ids]

    def style(self) -> Chat:
        """The style of rows for this template."""
        return Chat(self.tokenizer.special_texts, self.arguments, self.last_only)

    def problems(self, rows: Sequence[tuple[int, Row]]) -> list[BadRow | None]:
        """What ``tokenise`` would raise for each (line, row)."""
        return [error for _, error in self._tokenised([row for _, row in rows], "sft", every_reply=True)]

    def tokenise(self, rows: Sequence[Row], stage: str) -> list[Tokenised]:
        """The ids that ``stage`` reads of each row. Raises BadRow that names the turn where the
        template refuses it, and where it does not go on from its own beginning."""
        results = self._tokenised(rows, stage)
        for _, error in results:
            if error is not None:
                raise error
        return [row for row, _ in results]

    def _tokenised(
        self, rows: Sequence[Row], stage: str, every_reply: bool = False
    ) -> list[tuple[Tokenised | None, BadRow | None]]:
        """(row, None) or (None, error) of each."""
        requests: list[Request] = []
        plans = []
        for row in rows:
            messages = row.prompt.messages
            replies = row.responses if stage == "reward" or every_reply else (row.best,) if stage == "sft" else ()
            earlier = _learnt_turns(messages) if stage == "sft" and replies else []
            plans.append((row, replies, earlier, len(requests)))
            requests.append(_request(row.prompt, messages, cue=True))
            requests += [_request(row.prompt, (*messages, reply)) for reply in replies]
            for index in earlier:
                requests.append(_request(row.prompt, messages[:index], cue=True))
                requests.append(_request(row.prompt, messages[: index + 1]))
        rendered = list(chat_template.try_all(self.template, requests, self.tokens))
        firsts = [at for _, replies, _, first in plans for at in range(first, first + 1 + len(replies))]
        texts = self._texts({at: rendered[at] for at in firsts})
        results = []
        for row, replies, earlier, first in plans:
            pairs = first + 1 + len(replies)
            turns = [_Turn(index, *rendered[pairs + 2 * at : pairs + 2 * at + 2]) for at, index in enumerate(earlier)]
            try:
                prompt, *fulls = (_sound(texts[at]) for at in range(first, pairs))
                results.append((self._row(row, prompt, fulls, turns, stage), None))
            except BadRow as error:
                results.append((None, error))
            except TemplateError as error:
                results.append((None, self._at_turn(row, replies, error)))
        return results

    def _texts(self, rendered: dict[int, Rendered | TemplateError]) -> dict[int, _Text | TemplateError]:
        sound = {at: result for at, result in rendered.items() if isinstance(result, Rendered)}
        encodings = self.tokenizer.encodings([result.text for result in sound.values()])
        return rendered | {
            at: _Text(result, encoding.ids, [start for start, _ in encoding.offsets])
            for (at, result), encoding in zip(sound.items(), encodings, strict=True)
        }

    def _row(self, row: Row, prompt: _Text, fulls: list[_Text], turns: list[_Turn], stage: str) -> Tokenised:
        opening = len(self.bos) if prompt.ids[: len(self.bos)] == self.bos else 0
        replies, learnt, first = [], [], len(prompt.ids)
        for full in fulls:
            reply = self._reply(row, prompt, full)
            end = next((at + 1 for at, number in enumerate(reply) if number in self.stop_ids), None)
            if end is None:  # the template writes no end: the tokenizer's own stands for it
                reply, end = [*reply, self.tokenizer.eos_id], len(reply) + 1
            if stage == "sft" and not learnt:
                learnt = [*self._spans(row, prompt, turns), (first, first + end)]
            replies.append(reply if stage == "sft" else reply[:end])
        return Tokenised(prompt.ids, replies, list(row.scores) if stage == "reward" else [], opening, learnt)

    def _reply(self, row: Row, prompt: _Text, full: _Text) -> list[int]:
        """Ids that follow the prompt's. Where a token of the whole conversation reaches over the
        boundary, the reply is tokenised apart, as the rollout has it."""
        before, text = prompt.rendered.text, full.rendered.text
        if not text.startswith(before):
            raise BadRow(
                f"messages[{len(row.prompt.messages)}]: the chat template does not go on from its own beginning: with "
                f"the assistant's mark it writes {_around(before, text)}, with the reply {_around(text, before)}; "
                f"{TEXT_FIX}"
            )
        if full.ids[: len(prompt.ids)] == prompt.ids:
            return full.ids[len(prompt.ids) :]
        return self.tokenizer.encode_replies([text[len(before) :]])[0]

    def _spans(self, row: Row, prompt: _Text, turns: list[_Turn]) -> list[tuple[int, int]]:
        """(start, end) in the prompt's ids of each earlier turn that is learnt, with its end."""
        count, rendered, spans = len(row.prompt.messages), prompt.rendered, []
        speaks = [at for at, message in enumerate(row.prompt.messages) if message["role"] == "assistant"]
        marked = len(rendered.generated) == len(speaks)
        for turn in turns:
            if marked:
                first, last = rendered.generated[speaks.index(turn.index)]
            else:
                before, through = _sound(turn.before).text, _sound(turn.through).text
                first, last = len(before), len(commonprefix([through, rendered.text]))
                if not rendered.text.startswith(before):
                    raise BadRow(_no_prefix(turn.index, count))
            start, end = bisect_left(prompt.starts, first), bisect_left(prompt.starts, last)
            # a mark may leave out the turn's end
            stop = next((at + 1 for at in range(start, end + marked) if prompt.ids[at] in self.stop_ids), None)
            if stop is None and not marked:
                raise BadRow(_no_prefix(turn.index, count))
            spans.append((start, end if stop is None else stop))
        return spans

    def _at_turn(self, row: Row, replies: Sequence[dict], error: TemplateError) -> BadRow:
        """``error`` with the first message that the template refuses."""
        messages = [*row.prompt.messages, *replies[:1]]
        requests = [_request(row.prompt, messages[:count], cue=True) for count in range(1, len(messages) + 1)]
        results = chat_template.try_all(self.template, requests, self.tokens)
        at = next((at for at, result in enumerate(results) if isinstance(result, TemplateError)), len(messages) - 1)
        return BadRow(f"messages[{at}] ({messages[at]['role']}): {error}")


def of_checkpoint(data: DataConfig, checkpoint: str) -> RowTokenizer | None:
    """``by_setting`` for ``model.checkpoint``."""
    return by_setting(data, None if checkpoint == "demo" else Tokenizer(checkpoint))


def by_setting(data: DataConfig, tokenizer: Tokenizer | None) -> RowTokenizer | None:
    """What ``data.template`` says of the tokenizer's folder; None for the demo's, which is
    not trained yet. Raises ConfigError where it wants a chat template and there is none, and for
    one that can't be rendered."""
    template = ChatTemplate.read(tokenizer) if tokenizer and data.template != "hh" else None
    if template is not None:
        _ = template.turn_end  # before a row is read: a template that can't be rendered is refused
        return replace(template, arguments=data.chat_template_kwargs, last_only=data.assistant_turns == "last")
    if data.template == "chat":
        where = f"the tokenizer of {tokenizer.file.parent}" if tokenizer else "the demo's model"
        raise ConfigError(
            f'data.template = "chat", but {where} has no chat template; put one there (chat_template.jinja), or set '
            'data.template = "hh"'
        )
    return TextTokenizer(tokenizer) if tokenizer else None


def row_tokenizer(path: str | Path, tokenizer: Tokenizer) -> RowTokenizer:
    """For a file of prepared rows: the chat template's where the prompts are messages, HH's where
    they are text. Raises ConfigError where the tokenizer has no template for messages."""
    if not formats.has_messages(path):
        return TextTokenizer(tokenizer)
    template = ChatTemplate.read(tokenizer)
    if template is None:
        raise ConfigError(
            f"{path} holds messages, but the tokenizer of {tokenizer.file.parent} has no chat template to write them "
            'by; put one there (chat_template.jinja), or prepare the data with data.template = "hh"'
        )
    return template


TEXT_FIX = 'correct the template, or set data.template = "hh" to train on plain dialogue text'


def _choose(folder: Path) -> tuple[str, dict[str, str]]:
    config = hf_folder.json_object(folder, "tokenizer_config.json") or {}
    try:
        return chat_template.choose(hf_folder.read_text(folder, chat_template.FILE), config)
    except TemplateError as error:
        raise ConfigError(f"model.checkpoint: {folder / 'tokenizer_config.json'}: {error}") from None


def _learnt_turns(messages: Sequence[dict]) -> list[int]:
    return [at for at, message in enumerate(messages) if message["role"] == "assistant" and is_learnt(message)]


def _request(prompt: Conversation, messages: Sequence[dict], cue: bool = False) -> Request:
    """The weight of a message is no template's business."""
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    return Request(plain, cue, list(prompt.tools) or None, dict(prompt.arguments))


def _sound(result):
    if isinstance(result, TemplateError):
        raise result
    return result


def _around(text: str, other: str) -> str:
    """Where ``text`` differs from ``other``, for an error."""
    start = len(commonprefix([text, other]))
    return repr(text[max(0, start - 20) : start + 40])


def _no_prefix(index: int, last: int) -> str:
    return (
        f"messages[{index}]: the chat template writes this reply differently once messages[{last}] follows (as one "
        f"that drops earlier thoughts does), so that it can't be told which of its tokens are learnt; {SEVERAL_TURNS}"
    )
