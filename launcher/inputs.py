"""Is what the chain starts from there and whole? The Hugging Face checkpoint, its tokenizer, the training data. Standard library only.

Reads headers and indices, never a weight: a 7b1 folder takes some milliseconds.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

from training.settings import ConfigError
from training.shape import EMBEDDING, Shape, family

PEEK_ROWS = 100
"""Rows of the data that are parsed before anything is queued; the preparation then reads all of them."""
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
HEADER_MAX = 100_000_000
"""The safetensors format's own limit of a header, bytes."""
KINDS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def check_checkpoint(folder: Path, shape: Shape) -> int:
    """Bytes of the weights. ConfigError where a file is missing, truncated or not what the index or config.json says."""
    for single, index in KINDS:
        if (folder / index).is_file():
            files = _weight_map(folder / index)
            break
        if (folder / single).is_file():
            files = {}
            break
    else:
        raise ConfigError(f"model.checkpoint: no weights in {folder}: expected model.safetensors, or pytorch_model.bin, or several of "
                          "either with their .index.json; download the whole repository of the model")
    names = sorted(set(files.values())) or [single]
    held: dict[str, set[str]] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"model.checkpoint: {path} is missing, {index} names it (shard {names.index(name) + 1} of {len(names)}); "
                              "download it again")
        held[name] = set(_safetensors(path, shape)) if name.endswith(".safetensors") else _pickled(path)
    for tensor, name in files.items():
        if name.endswith(".safetensors") and tensor not in held[name]:
            raise ConfigError(f"model.checkpoint: {index} says that {name} holds {tensor}, it does not; index and shards are of different "
                              "checkpoints: download them again")
    _check_layers(folder, set(files) or held[names[0]], shape)
    return sum((folder / name).stat().st_size for name in names)


def _weight_map(path: Path) -> dict[str, str]:
    found = _json(path, "model.checkpoint").get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) and os.sep not in name for name in found.values()):
        raise ConfigError(f"model.checkpoint: {path} has no weight_map from tensors to files of its folder; download it again")
    return found


def _safetensors(path: Path, shape: Shape) -> list[str]:
    """The tensors' names. ConfigError unless the header can be read and the file is as long as it says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise ConfigError(f"model.checkpoint: {path} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`")
        if not 2 <= length <= min(HEADER_MAX, size - 8):
            raise ConfigError(f"model.checkpoint: {path} ({size} bytes) is no safetensors file, or was cut off; download it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: (tensor["dtype"], tensor["shape"], tensor["data_offsets"]) for name, tensor in header.items()
                       if name != "__metadata__"}
            end = max((offsets[1] for _, _, offsets in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"model.checkpoint: the header of {path} can't be read; download it again") from None
    if size != 8 + length + end:
        raise ConfigError(f"model.checkpoint: {path} has {size} bytes, its header says {8 + length + end}: truncated or still being "
                          "downloaded; download it again")
    embedding = _embedding(shape)
    for name, (dtype, sizes, (first, last)) in tensors.items():
        count = 1
        for number in sizes:
            count *= number
        if dtype in BYTES and last - first != count * BYTES[dtype]:
            raise ConfigError(f"model.checkpoint: {path}: {name} is {dtype} {sizes} but has {last - first} bytes; download it again")
        if name.endswith(embedding) and sizes != [shape.vocab, shape.hidden]:
            raise ConfigError(f"model.checkpoint: {path}: {name} is {sizes}, config.json says [{shape.vocab}, {shape.hidden}] "
                              "(vocab_size, hidden size); config.json and weights are of different models")
    return list(tensors)


def _pickled(path: Path) -> set[str]:
    """Nothing is unpickled here: that the archive is whole is all that is asked."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start.startswith(b"version "):
        raise ConfigError(f"model.checkpoint: {path} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`")
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"model.checkpoint: {path} is no whole torch archive: truncated, or saved by a torch before 1.6; download it "
                          "again, or save it anew with save_pretrained(folder, safe_serialization=True)")
    return set()


def _check_layers(folder: Path, names: set[str], shape: Shape) -> None:
    """ConfigError unless the tensors are of exactly the layers that config.json promises; a single .bin does not tell."""
    if not names:
        return
    layer = family(shape.family).LAYER
    layers = {int(match[1]) for name in names if (match := re.search(rf"(?:^|\.){layer}\.(\d+)\.", name))}
    if layers != set(range(shape.layers)):
        lacking, more = sorted(set(range(shape.layers)) - layers), sorted(layers - set(range(shape.layers)))
        what = f"lack layers {_few(lacking)}" if lacking else f"have layers {_few(more)} beyond them"
        raise ConfigError(f"model.checkpoint: config.json of {folder} says {shape.layers} layers; the weights {what}")
    if not any(name.endswith(_embedding(shape)) for name in names):
        raise ConfigError(f"model.checkpoint: the weights in {folder} have no {_embedding(shape)}; are they a {shape.family}'s?")


def _embedding(shape: Shape) -> str:
    """Hugging Face's name of the embedding."""
    (name,) = next(weight.parts for weight in shape.table.first if weight.key == EMBEDDING)
    return name


def check_tokenizer(folder: Path, shape: Shape) -> None:
    """ConfigError where tokenizer.json is no tokenizer, has more tokens than the model has rows, or PAD is missing or is EOS."""
    path = folder / "tokenizer.json"
    table = _json(path, "model.checkpoint")
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
    special = {name: _special(folder, name, ids) for name in ("eos", "pad")}
    if special["eos"] == special["pad"]:
        raise ConfigError(f"model.checkpoint: the padding token of {folder} is its EOS token (id {special['eos']}): PPO could not tell a "
                          'reply\'s end from padding; name another one that tokenizer.json has, "pad_token": "<pad>" in '
                          "tokenizer_config.json")


def _special(folder: Path, name: str, ids: dict[str, int]) -> int:
    """Id of "eos" or "pad", looked up as training/data/tokenizer.py does: the tokenizer's files by text, else config.json by number."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(folder / file, "model.checkpoint").get(f"{name}_token") if (folder / file).is_file() else None
        if token is not None:
            text = token["content"] if isinstance(token, dict) else token
            if text not in ids:
                raise ConfigError(f"model.checkpoint: {folder / file}: {name}_token = {text!r} is not in tokenizer.json; "
                                  "name one that is, or add it there")
            return ids[text]
    number = _json(folder / "config.json", "model.checkpoint").get(f"{name}_token_id")
    if not isinstance(number, int):
        raise ConfigError(f'model.checkpoint: {folder} names no {name} token; set "{name}_token" in tokenizer_config.json to one that '
                          "tokenizer.json has")
    return number


def check_data(source: str, skip_bad_rows: bool) -> str:
    """What the source is, in words. ConfigError where it can't be read or one of its first PEEK_ROWS rows can't be parsed.

    The rows are parsed by training.data.peek, a process of its own, with the parser that the stages use.
    """
    if source == "demo":
        return "generated demo data"
    if not Path(source).is_file():
        raise ConfigError(f'data.source = {source!r}: no such file; give a .jsonl or .jsonl.gz file, or "demo" for generated data')
    return _asked("data.source", "training.data.peek", source, str(PEEK_ROWS), *(["--skip-bad-rows"] if skip_bad_rows else []))


def check_questions(questions: str, references: str) -> None:
    """ConfigError where the evaluation could not read its questions, which it would say after all training."""
    if references != "gpt-4" and not Path(references).is_file():
        raise ConfigError(f'mtbench.references = {references!r}: no such file; give one in the schema of reference_answer/gpt-4.jsonl, or '
                          '"gpt-4" for the set\'s own')
    if (questions, references) != ("embedded", "gpt-4"):
        _asked("mtbench.questions", "eval.questions", questions, references)


def check_template(template: str, folder: Path) -> None:
    """ConfigError where the tokenizer lacks the chat template that the evaluation is to use."""
    config = folder / "tokenizer_config.json"
    held = (folder / "chat_template.jinja").is_file() or (config.is_file() and _json(config, "model.checkpoint").get("chat_template"))
    if template == "chat" and not held:
        raise ConfigError(f'mtbench.template = "chat", but the tokenizer of {folder} has no chat template; set mtbench.template to a text '
                          "with {question} in it")


def _asked(key: str, module: str, *arguments: str) -> str:
    """What a module of another part says of an input, in a process of its own: ConfigError where it refuses it."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == os.EX_DATAERR:
        words = done.stderr.strip()
        raise ConfigError(words if words.startswith(key) else f"{key}: {words}")
    if done.returncode:
        raise OSError(f"{module} {' '.join(arguments)} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def _json(path: Path, key: str) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} can't be read as JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{key}: {path} holds no JSON object; download it again")
    return found


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
