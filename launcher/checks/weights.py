"""Are the starting checkpoint's weights there, whole, and those of its config.json? Standard
library only.

Reads headers and indices, and of a tied model's output matrix a MiB: a 7b1 folder takes some
milliseconds. conversion/huggingface.py asks the same of the tensors when it reads them; of a .bin,
which is a pickle, nothing can be known here.
"""

from __future__ import annotations

import re
import zipfile
from itertools import islice
from pathlib import Path

from training.config.shape import EMBEDDING, Shape, family
from training.errors import ConfigError
from training.files.hf_folder import AGAIN, shown
from training.files.tensor_files import Tensor, Weights, find, read_header

FLOATS = ("BF16", "F16", "F32")
COMPARED = 2**20
"""Bytes at the start of two matrices by which they are told apart."""
OUTPUT, SCORE, SCORE_BIAS = "lm_head.weight", "score.weight", "score.bias"
OTHERS = "config.json and weights are of different models"


def check_checkpoint(folder: Path, shape: Shape) -> tuple[int, list[str]]:
    """(bytes of the weights, what a person should know of them). ConfigError where a file is
    missing, truncated or not what the index or config.json says."""
    weights = find(folder)
    tensors: dict[str, Tensor] = {}
    for path in weights.files:
        if path.suffix == ".bin":
            _check_pickled(path)
            continue
        of_file = read_header(path)
        _check_index(path, of_file, weights)
        twice = next((name for name in of_file if name in tensors), None)
        if twice is not None:
            raise ConfigError(
                f"model.checkpoint: {path} holds {shown(twice)}, as {tensors[twice].path.name} does; "
                "remove the stale shard"
            )
        tensors |= of_file
    _check_layers(folder, set(weights.places) or set(tensors), shape)
    if tensors:
        _check_tensors(folder, tensors, shape)
    return sum(path.stat().st_size for path in weights.files), weights.notes


def _check_index(path: Path, tensors: dict[str, Tensor], weights: Weights) -> None:
    """ConfigError where the index says that a file holds what it does not."""
    lost = next((name for name, file in weights.places.items() if file == path.name and name not in tensors), None)
    if lost is not None:
        raise ConfigError(
            f"model.checkpoint: the index of {path.parent} says that {path.name} holds {shown(lost)}, it does not; "
            "index and shards are of different checkpoints: download them again"
        )


def _check_pickled(path: Path) -> None:
    """Nothing is unpickled here: that the archive is whole is all that is asked."""
    with open(path, "rb") as file:
        if file.read(8) == b"version ":
            raise ConfigError(
                f"model.checkpoint: {path} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"model.checkpoint: {path} is no whole torch archive: truncated, or saved by a torch before 1.6; {AGAIN}, "
            "or save it again with save_pretrained(folder, safe_serialization=True)"
        )


def _check_layers(folder: Path, names: set[str], shape: Shape) -> None:
    """ConfigError unless the tensors are of exactly the layers that config.json promises; a single
    .bin does not tell."""
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
        raise ConfigError(
            f"model.checkpoint: the weights in {folder} have no {_embedding(shape)}; are they a {shape.family}'s?"
        )


def _embedding(shape: Shape) -> str:
    """Hugging Face's name of the embedding, without prefix."""
    (name,) = next(weight.parts for weight in shape.table.first if weight.key == EMBEDDING)
    return name


def _check_tensors(folder: Path, stored: dict[str, Tensor], shape: Shape) -> None:
    """ConfigError unless names, shapes and types are those of config.json's model: what
    conversion/huggingface.py reads."""
    prefix = family(shape.family).PREFIX
    tensors: dict[str, tuple[str, Tensor]] = {}
    for name, tensor in stored.items():
        if name.endswith(family(shape.family).UNUSED):
            continue
        short = name.removeprefix(prefix)
        if short in tensors:
            raise ConfigError(
                f"model.checkpoint: {folder} holds {shown(short)} twice, "
                f"with and without the prefix {prefix!r}; remove one"
            )
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
                raise ConfigError(
                    f"model.checkpoint: the weights in {folder} lack {short}, which config.json asks for; {OTHERS}{fix}"
                )
    if output and not _alike(output[1], embedding[1]):
        raise ConfigError(
            f"model.checkpoint: {folder}: {output[0]} differs from the embedding, but config.json ties them; set "
            f"tie_word_embeddings = false there if the head is its own, or remove {output[0]}"
        )
    if tensors:
        names = [name for name, _ in tensors.values()]
        few = ", ".join(map(shown, names[:5])) + (" ..." if len(names) > 5 else "")
        raise ConfigError(
            f"model.checkpoint: the weights in {folder} hold {few}, no {shape.family}'s of this config.json; {OTHERS}"
        )


def _check_tensor(
    name: str, tensor: Tensor, sizes: tuple[int, ...], types: dict[str, str], key: str, shape: Shape
) -> None:
    """ConfigError for other sizes than config.json's, and for another type than a weight's or than
    ``types`` has for ``key``."""
    if tensor.sizes != sizes:
        raise ConfigError(
            f"model.checkpoint: {tensor.path}: {name} is {list(tensor.sizes)}, config.json says {list(sizes)} "
            f"(vocab_size {shape.vocab}, hidden size {shape.hidden}, feed-forward width {shape.ffn_hidden}, "
            f"{shape.heads} heads, {shape.kv_heads} key-value heads); {OTHERS}: take both from the same repository"
        )
    if tensor.dtype not in FLOATS:
        raise ConfigError(
            f"model.checkpoint: {tensor.path}: {name} has type {shown(tensor.dtype)}; weights are {', '.join(FLOATS)} "
            "(quantised checkpoints can't be trained: take the original)"
        )
    if types.setdefault(key, tensor.dtype) != tensor.dtype:
        raise ConfigError(
            f"model.checkpoint: {tensor.path}: {name} is {tensor.dtype}, its like are {types[key]}; save the model "
            "in one type (model.to(torch.bfloat16).save_pretrained)"
        )


def _alike(one: Tensor, other: Tensor) -> bool:
    """The same shape, type and first bytes: an output matrix of its own differs from the embedding
    in every row."""
    starts = []
    for tensor in (one, other):
        with open(tensor.path, "rb") as file:
            file.seek(tensor.start)
            starts.append(file.read(min(COMPARED, tensor.bytes)))
    return (one.dtype, one.sizes) == (other.dtype, other.sizes) and starts[0] == starts[1]


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
