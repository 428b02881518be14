"""The files of an export beside its weights: the starting model's, corrected where they became
untrue.

A file that needs no correction keeps its bytes. What is corrected: the class and the type of the
weights, the tokens that end a reply and pad (as trained, in every file), code of the model's own
(left out), and the tokenizer's class where AutoTokenizer would give other ids than training had.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from conversion import classifier
from training.config.shape import Shape, family
from training.data import trial
from training.data.template import ChatTemplate
from training.data.tokenizer import FILE, Tokenizer
from training.errors import ConfigError
from training.files import hf_folder
from training.files.safe_files import open_regular
from training.files.special_tokens import SpecialTokens

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
COPIED = ("config.json", "generation_config.json", *TOKENIZER)
OF_A_CLASSIFIER = ("id2label", "label2id", "num_labels", "problem_type")


def check(model: Path, shape: Shape) -> None:
    """Raises ConfigError, before anything is written, for files that an export could not copy or
    correct."""
    for name in COPIED:
        hf_folder.file(model, name)
    if hf_folder.file(model, FILE):
        Tokenizer(model)
    SpecialTokens.read(model, shape.vocab)


def names(model: Path, head: str) -> list[str]:
    """Those that are there; a classifier generates nothing."""
    names = [name for name in COPIED if head != "scalar" or name != "generation_config.json"]
    return [name for name in names if hf_folder.file(model, name)]


def write(model: Path, folder: Path, shape: Shape, head: str, dtype: torch.dtype) -> None:
    """Copy ``model``'s small files into ``folder`` and correct them."""
    for name in names(model, head):
        copy(model / name, folder / name)
    tokenizer = Tokenizer(folder) if (folder / FILE).is_file() else None
    _rewrite(folder, "config.json", lambda values: _config(values, shape, dtype, tokenizer))
    if tokenizer:
        _rewrite(folder, "generation_config.json", lambda values: values.update(_tokens(values, tokenizer)))
        _set_class(folder)
    if head == "scalar":
        classifier.set_config(folder, shape)


def copy(source: Path, target: Path) -> None:
    """A regular file; what only its owner may read stays so."""
    handle = open_regular(source.resolve())
    mode = os.fstat(handle).st_mode & 0o666
    new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(handle, "rb") as stream, open(new, "wb") as copied:
        while block := stream.read(1 << 20):
            copied.write(block)


def _config(values: dict, shape: Shape, dtype: torch.dtype, tokenizer: Tokenizer | None) -> None:
    name = str(dtype).removeprefix("torch.")
    values.update({key: name for key in ("dtype", "torch_dtype") if key in values})
    values["architectures"] = [f"{family(shape.family).HUGGING_FACE}ForCausalLM"]
    for key in (*OF_A_CLASSIFIER, "auto_map"):
        values.pop(key, None)
    if tokenizer:
        values.update(_tokens(values, tokenizer))


def _tokens(values: dict, tokenizer: Tokenizer) -> dict:
    """What ``values`` is to say of the tokens that end a reply, and pad."""
    ends = _ends(tokenizer)
    tokens = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if "pad" in tokenizer.special_tokens.texts or values.get("pad_token_id") is not None:
        tokens["pad_token_id"] = tokenizer.pad_id
    return tokens


def _ends(tokenizer: Tokenizer) -> list[int]:
    """Ids that end a reply: those of the folder's files, then the chat template's end of a turn. A
    template that can't be rendered was not trained with."""
    try:
        template = ChatTemplate.read(tokenizer)
        own = template.stop_ids if template else ()
    except ConfigError:
        own = ()
    return list(dict.fromkeys((*tokenizer.stop_ids, *own)))


def _set_class(folder: Path) -> None:
    """Name the class that takes tokenizer.json as it is, where AutoTokenizer would give other ids
    than training had."""
    values = hf_folder.json_object(folder, "tokenizer_config.json") or {}
    if values.get("tokenizer_class") == trial.PLAIN and "auto_map" not in values:
        return
    problem = trial.differing(folder, trial.SAMPLES, plain=False)
    if problem:
        print(f"{folder.name}: AutoTokenizer {problem}: tokenizer_class is set to {trial.PLAIN}", flush=True)
        values["tokenizer_class"] = trial.PLAIN
        _save(folder / "tokenizer_config.json", values)
    _rewrite(folder, "tokenizer_config.json", lambda table: table.pop("auto_map", None))


def _rewrite(folder: Path, name: str, change) -> None:
    """``change`` the JSON object of a file that is there; written only where that changes it."""
    values = hf_folder.json_object(folder, name)
    if values is None:
        return
    before = json.dumps(values)
    change(values)
    if json.dumps(values) != before:
        _save(folder / name, values)


def _save(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
