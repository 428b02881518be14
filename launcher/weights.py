"""Are the starting checkpoint's weights there, whole, and those of its config.json? Standard library only.

Reads headers and indices, and of a tied model's output matrix a MiB: a 7b1 folder takes some milliseconds. conversion/huggingface.py
asks the same of the tensors when it reads them; of a .bin, which is a pickle, nothing can be known here.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zipfile
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from launcher.inputs import read_json
from training.settings import ConfigError
from training.shape import EMBEDDING, Shape, family

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("BF16", "F16", "F32")
HEADER_MAX = 100_000_000
"""The safetensors format's own limit of a header, bytes."""
COMPARED = 2**20
"""Bytes at the start of two matrices by which they are told apart."""
KINDS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
OUTPUT, SCORE, SCORE_BIAS = "lm_head.weight", "score.weight", "score.bias"
OTHERS = "config.json and weights are of different models"


class Tensor(NamedTuple):
    path: Path
    dtype: str
    sizes: list[int]
    start: int
    """Byte of the file that it begins at."""
    bytes: int


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
    held: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ConfigError(f"model.checkpoint: {path} is missing, {index} names it (shard {names.index(name) + 1} of {len(names)}); "
                              "download it again")
        if not name.endswith(".safetensors"):
            _check_pickled(path)
            continue
        tensors = _safetensors(path)
        lost = next((tensor for tensor, file in files.items() if file == name and tensor not in tensors), None)
        if lost:
            raise ConfigError(f"model.checkpoint: {index} says that {name} holds {lost}, it does not; index and shards are of different "
                              "checkpoints: download them again")
        twice = next((tensor for tensor in tensors if tensor in held), None)
        if twice:
            raise ConfigError(f"model.checkpoint: {path} holds {twice}, as {held[twice].path.name} does; remove the stale shard")
        held |= tensors
    _check_layers(folder, set(files) or set(held), shape)
    if held and all(name.endswith(".safetensors") for name in names):
        _check_tensors(folder, held, shape)
    return sum((folder / name).stat().st_size for name in names)


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path, "model.checkpoint").get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) and os.sep not in name for name in found.values()):
        raise ConfigError(f"model.checkpoint: {path} has no weight_map from tensors to files of its folder; download it again")
    return found


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name. ConfigError unless the header can be read and the file is as long as it says."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        _check_fetched(path, start)
        if not 2 <= length <= min(HEADER_MAX, size - 8):
            raise ConfigError(f"model.checkpoint: {path} ({size} bytes) is no safetensors file, or was cut off; download it again")
        try:
            tensors = {name: _tensor(path, 8 + length, **tensor) for name, tensor in json.loads(file.read(length)).items()
                       if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ConfigError(f"model.checkpoint: the header of {path} can't be read; download it again") from None
    end = max((tensor.start + tensor.bytes for tensor in tensors.values()), default=8 + length)
    if size != end:
        raise ConfigError(f"model.checkpoint: {path} has {size} bytes, its header says {end}: truncated or still being "
                          "downloaded; download it again")
    for name, tensor in tensors.items():
        if tensor.dtype in BYTES and tensor.bytes != math.prod(tensor.sizes) * BYTES[tensor.dtype]:
            raise ConfigError(f"model.checkpoint: {path}: {name} is {tensor.dtype} {tensor.sizes} but has {tensor.bytes} bytes; download "
                              "it again")
    return tensors


def _tensor(path: Path, data: int, *, dtype: str, shape: list, data_offsets: list) -> Tensor:
    """Of one entry of a header whose data begin at byte ``data``. TypeError or ValueError for what is none."""
    first, last = data_offsets
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in (*shape, first, last)):
        raise TypeError
    return Tensor(path, dtype, list(shape), data + first, last - first)


def _check_fetched(path: Path, start: bytes) -> None:
    if start.startswith(b"version "):
        raise ConfigError(f"model.checkpoint: {path} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`")


def _check_pickled(path: Path) -> None:
    """Nothing is unpickled here: that the archive is whole is all that is asked."""
    with open(path, "rb") as file:
        start = file.read(8)
    _check_fetched(path, start)
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"model.checkpoint: {path} is no whole torch archive: truncated, or saved by a torch before 1.6; download it "
                          "again, or save it anew with save_pretrained(folder, safe_serialization=True)")


def _check_layers(folder: Path, names: set[str], shape: Shape) -> None:
    """ConfigError unless the tensors are of exactly the layers that config.json promises; a single .bin does not tell."""
    if not names:
        return
    layer = family(shape.family).LAYER
    layers = {int(match[1]) for name in names if (match := re.search(rf"(?:^|\.){layer}\.(\d{{1,9}})\.", name))}
    lacking = list(islice((at for at in range(shape.layers) if at not in layers), 6))
    more = sorted(at for at in layers if at >= shape.layers)
    if lacking or more:
        what = f"lack layers {_few(lacking)}" if lacking else f"have layers {_few(more)} beyond them"
        raise ConfigError(f"model.checkpoint: config.json of {folder} says {shape.layers} layers; the weights {what}")
    if not any(name.endswith(_embedding(shape)) for name in names):
        raise ConfigError(f"model.checkpoint: the weights in {folder} have no {_embedding(shape)}; are they a {shape.family}'s?")


def _embedding(shape: Shape) -> str:
    """Hugging Face's name of the embedding, without prefix."""
    (name,) = next(weight.parts for weight in shape.table.first if weight.key == EMBEDDING)
    return name


def _check_tensors(folder: Path, held: dict[str, Tensor], shape: Shape) -> None:
    """ConfigError unless names, shapes and types are those of config.json's model: what conversion/huggingface.py reads."""
    prefix = family(shape.family).PREFIX
    tensors: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in held.items():
        if name.endswith(family(shape.family).UNUSED):
            continue
        short = name.removeprefix(prefix)
        if short in tensors:
            raise ConfigError(f"model.checkpoint: {folder} holds {short} twice, with and without the prefix {prefix!r}; remove one")
        tensors[short] = (name, tensor)
    head = "scalar" if SCORE in tensors else "tied" if shape.tied else "untied"
    output = tensors.pop(OUTPUT, None) if head == "tied" else None
    embedding = tensors.get(_embedding(shape))
    types: dict[str, str] = {}
    for weight, _, parts in shape.weights(head):
        for short, sizes in parts.items():
            if short in tensors:
                _check_tensor(*tensors.pop(short), sizes, types, weight.key, shape)
            elif short != SCORE_BIAS:  # Hugging Face's heads have none: conversion takes 0
                fix = "; set tie_word_embeddings = true there if it is the embedding" if short == OUTPUT else ""
                raise ConfigError(f"model.checkpoint: the weights in {folder} lack {short}, which config.json asks for; {OTHERS}{fix}")
    if output and not _alike(output[1], embedding[1]):
        raise ConfigError(f"model.checkpoint: {folder}: {output[0]} differs from the embedding, but config.json ties them; set "
                          f"tie_word_embeddings = false there if the head is its own, or remove {output[0]}")
    if tensors:
        names = [name for name, _ in tensors.values()]
        raise ConfigError(f"model.checkpoint: the weights in {folder} hold {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}, "
                          f"no {shape.family}'s of this config.json; {OTHERS}")


def _check_tensor(name: str, tensor: Tensor, sizes: tuple[int, ...], types: dict[str, str], key: str, shape: Shape) -> None:
    """ConfigError for other sizes than config.json's, and for another type than a weight's or than ``types`` has for ``key``."""
    if tuple(tensor.sizes) != sizes:
        raise ConfigError(f"model.checkpoint: {tensor.path}: {name} is {tensor.sizes}, config.json says {list(sizes)} "
                          f"(vocab_size {shape.vocab}, hidden size {shape.hidden}, feed-forward width {shape.ffn}, {shape.heads} heads, "
                          f"{shape.groups} key-value heads); {OTHERS}: take both from the same repository")
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"model.checkpoint: {tensor.path}: {name} has type {tensor.dtype}; weights are {', '.join(FLOATS)} "
                          "(quantised checkpoints can't be trained: take the original)")
    if types.setdefault(key, tensor.dtype) != tensor.dtype:
        raise ConfigError(f"model.checkpoint: {tensor.path}: {name} is {tensor.dtype}, its like are {types[key]}; save the model in one "
                          "type (model.to(torch.bfloat16).save_pretrained)")


def _alike(one: Tensor, other: Tensor) -> bool:
    """The same shape, type and first bytes: an output matrix of its own differs from the embedding in every row."""
    starts = []
    for tensor in (one, other):
        with open(tensor.path, "rb") as file:
            file.seek(tensor.start)
            starts.append(file.read(min(COMPARED, tensor.bytes)))
    return (one.dtype, one.sizes) == (other.dtype, other.sizes) and starts[0] == starts[1]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
