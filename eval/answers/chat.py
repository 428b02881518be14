"""A model's chat template in the evaluation.

training/files/chat_template.py renders, for training and rollout as for the evaluation, so that the
three can't differ. This module reads the evaluation's folders and tokenizers.

``python -m eval.answers.chat FOLDER``: does the folder's template render a conversation? Exit
status 65 and one line where not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.config import HH_STOP, HH_TURN, MTBenchConfig
from eval.errors import DataError
from eval.files import foreign
from training.files import chat_template

JSON_MAX = 2**23
"""Bytes of the largest tokenizer_config.json that is read."""
USER, ASSISTANT = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
TRIAL = ([USER], [USER, ASSISTANT, USER])
"""What the evaluation asks: one turn, and two."""
SYSTEM = {"role": "system", "content": "You are a judge."}


class TemplateError(DataError):
    """A template that can't be used: the message says why, in one line; the caller names the
    folder."""


def render(
    template: str,
    messages: Sequence[Mapping],
    tokens: Mapping | None = None,
    tools: Sequence[Mapping] | None = None,
    arguments: Mapping | None = None,
    cue: bool = True,
) -> str:
    """The text of ``messages`` ({"role", "content"} each). ``tokens``: {"bos_token": "<s>", ...};
    ``arguments``: more variables for the template; ``cue``: with the assistant's mark at the end.
    Several threads may call it. Raises TemplateError."""
    try:
        request = chat_template.Request(messages, cue, tools or None, arguments or {})
        return next(chat_template.render_all(template, [request], tokens)).text
    except chat_template.TemplateError as error:
        raise TemplateError(str(error)) from None


def read(folder: str | Path) -> tuple[str, dict[str, str]]:
    """(template, special tokens by name) of a Hugging Face folder; the template is "" where it has
    none.

    chat_template.jinja comes before tokenizer_config.json's, of several named ones "default"
    counts, as transformers has it. Raises TemplateError for damaged files.
    """
    folder, values = Path(folder), {}
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if config.exists():
        try:
            values = json.loads(_text(config, JSON_MAX))
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{config} can't be read as JSON ({error}); download it again") from None
        if not isinstance(values, dict):
            raise TemplateError(f"{config} holds no JSON object; download it again")
    try:
        return chat_template.choose(_text(file, chat_template.TEMPLATE) if file.exists() else None, values)
    except chat_template.TemplateError as error:
        raise TemplateError(f"{config}: {error}") from None


def settled(config: MTBenchConfig) -> MTBenchConfig:
    """``config`` with "auto" replaced in ``template`` and ``stop``. Raises TemplateError where some
    of the models have a chat template and some have none."""
    template = config.template
    if template == "auto":
        with_template = {name: bool(read(folder)[0]) for name, folder in config.paths.models.items()}
        if len(set(with_template.values())) > 1:
            lacking = ", ".join(name for name, has_one in with_template.items() if not has_one)
            raise TemplateError(
                f'mtbench.template = "auto": {lacking} of the models have no chat template, the others have one; '
                f"give one template for all: {HH_TURN!r}, or another text with {{question}}"
            )
        template = "chat" if all(with_template.values()) else HH_TURN
    stop = config.stop
    if stop == "auto":
        stop = HH_STOP if template == HH_TURN else ""
    return dataclasses.replace(config, template=template, stop=stop)


def render_by(
    tokenizer,
    messages: Sequence[Mapping],
    tools: Sequence[Mapping] | None = None,
    arguments: Mapping | None = None,
    cue: bool = True,
) -> str:
    """``render`` by a transformers tokenizer's own template. ``cue``: with the assistant's mark at
    the end. Raises TemplateError."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not isinstance(template, str):
        raise TemplateError("the tokenizer has no chat template that is called default")
    return render(template, messages, tokenizer.special_tokens_map, tools, arguments, cue)


def check(folder: str | Path) -> str:
    """That the folder's template renders, in words. Raises TemplateError where it has none, or it
    fails."""
    template, tokens = read(folder)
    if not template:
        raise TemplateError(f"{folder}: its tokenizer has no chat template")
    for messages in TRIAL:
        try:
            text = render(template, messages, tokens)
        except TemplateError as error:
            raise TemplateError(f"{folder}: {error}") from None
        if any(message["content"] not in text for message in messages):
            raise TemplateError(
                f"{folder}: the chat template leaves out what was said: {messages} gives {text[:200]!r}"
            )
    return f"{folder}: its chat template renders"


def takes_system(template: str, tokens: Mapping | None = None) -> bool:
    """Does a system turn's text reach the model? Some templates refuse it (Gemma's), some leave it
    out."""
    try:
        return SYSTEM["content"] in render(template, [SYSTEM, USER], tokens)
    except TemplateError:
        return False


def _text(path: Path, most: int) -> str:
    """The file's text. Raises TemplateError for what is no file, too large, or no UTF-8."""
    try:
        return foreign.content(path, most).decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path} is no UTF-8 (byte {error.start}); download it again") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TemplateError(f"{path} can't be read ({reason}): expected the file of a tokenizer") from None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m eval.answers.chat", description="Does a folder's chat template render a conversation?"
    )
    parser.add_argument("folder", help="Hugging Face folder of a model with a chat template")
    try:
        print(check(parser.parse_args(arguments).folder))
    except TemplateError as error:
        print(error, file=sys.stderr)
        return os.EX_DATAERR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
