"""Is what the chain starts from there and whole? The tokenizer, the training data, the questions.
Standard library only.

The weights: launcher/checks/weights.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
from pathlib import Path

from launcher import run_module
from launcher.config import environment
from training.checkpoint.checksums import touched
from training.config.data import DataConfig, ModelConfig
from training.config.shape import Shape
from training.errors import ConfigError
from training.files.hf_folder import read_text

TOKENIZER = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that a tokenizer's ids depend on."""
TRIAL_SECONDS = 300
"""Longest time that loading and comparing a tokenizer may take: transformers is imported, perhaps
from a slow disk."""
FOLDER = "\0"
_trials: dict[bytes, list[str]] = {}
"""What was found out of tokenizers, by their files' content: a sweep's runs have the same."""
PEEK_ROWS = 1000
"""Rows of the data that are parsed before anything is queued; the preparation then reads all of
them."""


def check_tokenizer(folder: Path, shape: Shape, source: str) -> list[str]:
    """What a person should know of the tokenizer. ConfigError where a stage would fail with it, or
    train on other tokens than the evaluation uses; ``source``: the data, whose first rows are
    tried.

    training.data.trial, a process of its own, loads what the stages load. It is not asked twice for
    the same files.
    """
    key = hashlib.sha256(f"{shape.vocab} {source} {touched(source) if Path(source).exists() else 0}".encode())
    for name in TOKENIZER:
        key.update(f"\0{name}\0{read_text(folder, name)}".encode("utf-8", "replace"))
    if key.digest() not in _trials:
        message = _ask(
            "model.checkpoint", "training.data.trial", str(folder), str(shape.vocab), source, timeout=TRIAL_SECONDS
        )
        _trials[key.digest()] = [note.replace(str(folder), FOLDER) for note in json.loads(message.splitlines()[-1])]
    return [note.replace(FOLDER, str(folder)) for note in _trials[key.digest()]]


def check_data(
    data: DataConfig, model: ModelConfig | None, stages: dict[str, tuple[str, str, int]]
) -> tuple[str, list[str]]:
    """What the source is, in words, with a row as the model sees it, and what of it is dropped or
    cut, a line each.

    The first PEEK_ROWS rows are read by training.data.peek, a process of its own, as the
    preparation and the stages read them. ``model`` None: its tokenizer can't be asked. ``stages``:
    name -> (kind of row, key of the length, length). Raises ConfigError where it can't be done.
    """
    if data.source == "demo":
        return "generated demo data", []
    if not Path(data.source).exists():
        raise ConfigError(
            f"data.source = {data.source!r}: no such file; give a .jsonl or .jsonl.gz file, "
            'or "demo" for generated data'
        )
    settings = {"data": dataclasses.asdict(data), "model": dataclasses.asdict(model) if model else {}, "stages": stages}
    first, *lines = _peeked(data.source, json.dumps(settings), tuple(touched(data.source))).splitlines()
    row = [line for line in lines if line.startswith("  ")]
    return "\n".join([first, *row]), [line for line in lines if not line.startswith("  ")]


@functools.lru_cache
def _peeked(source: str, settings: str, _seen: tuple[int, ...]) -> str:
    """Asked once for all elements of a sweep."""
    return _ask("data.source", "training.data.peek", source, str(PEEK_ROWS), settings)


def check_questions(questions: str, references: str) -> None:
    """ConfigError where the evaluation could not read its questions, which it would say after all
    training."""
    if references != "gpt-4" and not Path(references).is_file():
        raise ConfigError(
            f"mtbench.references = {references!r}: no such file; give one in the schema of "
            'reference_answer/gpt-4.jsonl, or "gpt-4" for the set\'s own'
        )
    if (questions, references) != ("embedded", "gpt-4"):
        _ask("mtbench.questions", "eval.questions", questions, references)


def check_template(template: str, folder: Path) -> None:
    """ConfigError where the evaluation is to use a chat template that is not there or can't be
    rendered."""
    if template != "chat":
        return
    try:
        _ask("mtbench.template", "eval.answers.chat", str(folder))
    except ConfigError as error:
        message = str(error).removeprefix("mtbench.template: ")
        raise ConfigError(
            f'mtbench.template = "chat", but {message}; set mtbench.template to a text with {{question}} in it'
        ) from None


def _ask(key: str, module: str, *arguments: str, timeout: float | None = None) -> str:
    """What a module of another part says of an input, in a process of its own: ConfigError where it
    refuses it."""
    command = run_module.command(module, *arguments)
    try:
        done = subprocess.run(
            command,
            env=environment.outside(),
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{key}: {module} {' '.join(arguments)} is still at work after {timeout:g} s; "
            "is a file damaged, or the disk slow?"
        ) from None
    if done.returncode == os.EX_DATAERR:
        message = done.stderr.strip()
        raise ConfigError(message if message.startswith(key) else f"{key}: {message}")
    if done.returncode == os.EX_USAGE:
        raise ConfigError(done.stderr.strip())
    if done.returncode:
        raise OSError(
            f"{module} {' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}"
        )
    return done.stdout.strip()
