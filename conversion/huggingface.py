"""Hugging Face folders: safetensors (and legacy .bin) in, sharded safetensors out; tensors stay on
disk (conversion/tensors.py)."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import torch

from conversion.tensors import FLOATS, Rows, Stored, equal, mapped, view
from conversion.weights import HEADS, check_names, embedding_name, entries, head_of, stored_name
from training.config.shape import Shape, family
from training.errors import ConfigError
from training.files import tensor_files
from training.files.hf_folder import shown
from training.files.tensor_files import SAFETENSORS

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""safetensors' names of the data types that weights may have."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(folder: str | Path, shape: Shape) -> tuple[str, dict[str, Stored]]:
    """(kind of head, tensors by name without prefix) of a Hugging Face folder; a scalar head where
    it has score.weight.

    Raises ConfigError where files are missing, truncated or unsafe, and where the tensors are not
    exactly those of ``shape``.
    """
    folder, prefix = Path(folder), family(shape.family).PREFIX
    tensors = {}
    for name, tensor in _tensors(folder).items():
        if name.endswith(family(shape.family).UNUSED):
            continue
        short = name.removeprefix(prefix)
        if short in tensors:
            raise ConfigError(
                f"{folder} holds {shown(short)} twice, with and without the prefix {prefix!r}; remove one"
            )
        tensors[short] = tensor
    head = head_of(shape)
    if "score.weight" in tensors:
        head = "scalar"
        if shape.score_bias:
            tensors.setdefault("score.bias", Stored.of_tensor(torch.zeros(1, dtype=tensors["score.weight"].dtype)))
    tied_head = tensors.pop(HEADS["untied"], None) if head == "tied" else None
    table = [(entry, name, size) for entry in entries(shape, head) for name, size in entry.parts.items()]
    check_names(tensors, [name for _, name, _ in table], folder, shape)
    for entry, name, size in table:
        check_tensor(folder, name, tensors[name], size, entry.vocabulary)
    if tied_head is not None and not equal(tied_head, tensors[embedding_name(shape)]):
        raise ConfigError(
            f"{folder}: {HEADS['untied']} differs from the embedding, but config.json ties them; set "
            f"tie_word_embeddings = false there if the head is its own, or remove {HEADS['untied']}"
        )
    return head, tensors


def check_tensor(where, name: str, tensor: Rows, size: tuple[int, ...], vocabulary: bool) -> None:
    """Raises ConfigError for another shape than config.json's, and for a type that is no
    weight's."""
    if tensor.shape != size and vocabulary and tensor.shape[1:] == size[1:]:
        raise ConfigError(f"{where}: {name} has {tensor.shape[0]} rows, config.json says vocab_size = {size[0]}")
    if tensor.shape != size:
        raise ConfigError(f"{where}: {name} has shape {list(tensor.shape)}, config.json says {list(size)}")
    if tensor.dtype not in FLOATS:
        raise ConfigError(
            f"{where}: {name} has type {str(tensor.dtype).removeprefix('torch.')}; weights are bf16, fp16 or fp32 "
            "(quantised checkpoints can't be trained: take the original)"
        )


def _tensors(folder: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for path in tensor_files.find(folder).files:
        tensors = read_bin(path) if path.suffix == ".bin" else read_safetensors(path)
        twice = stored.keys() & tensors.keys()
        if twice:
            raise ConfigError(
                f"{path} holds {shown(min(twice))}, which another shard holds, too; remove the stale shard"
            )
        stored.update(tensors)
    return stored


def read_safetensors(path: Path) -> dict[str, Stored]:
    """Tensors of one file. Raises ConfigError where it is truncated, damaged or of types that are
    no weights'."""
    header = tensor_files.read_header(path)
    mapping, tensors = mapped(path), {}
    for name, tensor in header.items():
        if tensor.dtype not in DTYPES:
            raise ConfigError(
                f"{path}: {shown(name)} has type {shown(tensor.dtype)}; weights are BF16, F16 or F32 "
                "(quantised checkpoints can't be trained: take the original)"
            )
        tensors[name] = Stored.of_tensor(view(mapping, DTYPES[tensor.dtype], tensor.sizes, tensor.start))
    return tensors


def read_bin(path: Path) -> dict[str, Stored]:
    """Tensors of one legacy .bin file, memory-mapped, weights only. Raises ConfigError for whatever
    else is pickled in it."""
    loaded = load_pickle(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ConfigError(
            f"{path} holds {type(loaded).__name__}, not a dictionary of tensors; save the model's state_dict()"
        )
    return {name: Stored.of_tensor(tensor) for name, tensor in loaded.items()}


def load_pickle(path: Path, fix: str = "Use safetensors, or weights saved as a plain state_dict()"):
    """torch.load that runs no code of the file and maps its tensors. Raises ConfigError: why, and
    ``fix`` where it is more than tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        reason = match[1] if match else str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"{path} asks to load more than tensors ({reason}); a pickle can run any code, so it is not loaded. {fix}"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(
            f"{path} can't be read ({str(error).splitlines()[0]}): truncated, or older than torch 1.6's format; "
            "download it again, or load and save it once with torch.save"
        ) from None


def plan(names: dict[str, tuple[int, ...]], dtype: torch.dtype, max_shard_gb: float) -> dict[str, list[str]]:
    """File name -> the tensors (by name without prefix) in it; a file is at most ``max_shard_gb``
    or one tensor."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in names.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_gb * 1e9:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


def header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Length and header of a safetensors file with these tensors (stored names), as the library
    writes it: sorted by name."""
    table, position = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(shapes):
        size = torch.Size(shapes[name]).numel() * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def index(shape: Shape, shards: dict[str, list[str]], total: int) -> str:
    """Text of model.safetensors.index.json; ``total``: bytes of all tensors."""
    places = {stored_name(shape, name): file for file, names in shards.items() for name in names}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"
