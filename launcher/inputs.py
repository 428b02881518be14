"""Is what the chain starts from there and whole? The tokenizer, the training data, the questions. Standard library only.

The weights: launcher/weights.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from training.checksums import touched
from training.data.config import DataConfig, ModelConfig
from training.settings import ConfigError
from training.shape import Shape

PEEK_ROWS = 1000
"""Rows of the data that are parsed before anything is queued; the preparation then reads all of them."""


def check_tokenizer(folder: Path, shape: Shape) -> None:
    """ConfigError where tokenizer.json is no tokenizer, has more tokens than the model has rows, or names an EOS or PAD that it lacks."""
    path = folder / "tokenizer.json"
    table = read_json(path, "model.checkpoint")
    vocabulary = table.get("model", {}).get("vocab", {}) if isinstance(table.get("model"), dict) else {}
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {token[0]: number for number, token in enumerate(vocabulary)}
    ids |= {token["content"]: token["id"] for token in table.get("added_tokens", [])}
    if not ids:
        raise ConfigError(f"model.checkpoint: {path} has no vocabulary; download it again, or save the fast tokenizer there with "
                          "AutoTokenizer.from_pretrained(...).save_pretrained(folder)")
    highest = max(ids, key=ids.__getitem__)
    if ids[highest] >= shape.vocab:
        raise ConfigError(f"model.checkpoint: token {highest!r} of {path} has id {ids[highest]}, the embedding has {shape.vocab} rows "
                          "(vocab_size); the tokenizer is another model's, or the embedding was not resized after tokens were added")
    _special(folder, "eos", ids)
    _special(folder, "pad", ids, required=False)


def _special(folder: Path, name: str, ids: dict[str, int], required: bool = True) -> int | None:
    """Id of "eos" or "pad", looked up as training/data/tokenizer.py does: the tokenizer's files by text, else config.json by number."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_json(folder / file, "model.checkpoint").get(f"{name}_token") if (folder / file).is_file() else None
        if token is not None:
            text = token.get("content") if isinstance(token, dict) else token
            if not isinstance(text, str) or text not in ids:
                raise ConfigError(f"model.checkpoint: {folder / file}: {name}_token = {text!r} is not in tokenizer.json; "
                                  "name one that is, or add it there")
            return ids[text]
    number = read_json(folder / "config.json", "model.checkpoint").get(f"{name}_token_id")
    if type(number) is not int:
        if not required:
            return None
        raise ConfigError(f'model.checkpoint: {folder} names no {name} token; set "{name}_token" in tokenizer_config.json to one that '
                          "tokenizer.json has")
    return number


def check_data(data: DataConfig, model: ModelConfig | None, stages: dict[str, tuple[str, str, int]]) -> tuple[str, list[str]]:
    """What the source is, in words, and what of it is dropped or cut, a line each.

    The first PEEK_ROWS rows are read by training.data.peek, a process of its own, as the preparation and the stages read them.
    ``model`` None: its tokenizer can't be asked. ``stages``: name -> (kind of row, key of the length, length).
    Raises ConfigError where it can't be done.
    """
    if data.source == "demo":
        return "generated demo data", []
    if not Path(data.source).exists():
        raise ConfigError(f"data.source = {data.source!r}: no such file; give a .jsonl or .jsonl.gz file, "
                          'or "demo" for generated data')
    settings = {"data": dataclasses.asdict(data), "model": dataclasses.asdict(model) if model else {}, "stages": stages}
    first, *dropped = _peeked(data.source, json.dumps(settings), tuple(touched(data.source))).splitlines()
    return first, dropped


@functools.lru_cache
def _peeked(source: str, settings: str, _seen: tuple[int, ...]) -> str:
    """Asked once for all elements of a sweep."""
    return _asked("data.source", "training.data.peek", source, str(PEEK_ROWS), settings)


def check_questions(questions: str, references: str) -> None:
    """ConfigError where the evaluation could not read its questions, which it would say after all training."""
    if references != "gpt-4" and not Path(references).is_file():
        raise ConfigError(f'mtbench.references = {references!r}: no such file; give one in the schema of reference_answer/gpt-4.jsonl, or '
                          '"gpt-4" for the set\'s own')
    if (questions, references) != ("embedded", "gpt-4"):
        _asked("mtbench.questions", "eval.questions", questions, references)


def check_template(template: str, folder: Path) -> None:
    """ConfigError where the evaluation is to use the tokenizer's chat template and there is none, or it can't be rendered."""
    if template != "chat":
        return
    try:
        _asked("mtbench.template", "eval.chat", str(folder))
    except ConfigError as error:
        said = str(error).removeprefix("mtbench.template: ")
        raise ConfigError(f'mtbench.template = "chat", but {said}; set mtbench.template to a text with {{question}} in it') from None


def _asked(key: str, module: str, *arguments: str) -> str:
    """What a module of another part says of an input, in a process of its own: ConfigError where it refuses it."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == os.EX_DATAERR:
        words = done.stderr.strip()
        raise ConfigError(words if words.startswith(key) else f"{key}: {words}")
    if done.returncode == os.EX_USAGE:
        raise ConfigError(done.stderr.strip())
    if done.returncode:
        raise OSError(f"{module} {' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def read_json(path: Path, key: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {path} can't be read as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} holds no JSON object; download it again")
    return found
