"""The weights of a Hugging Face folder: their files, and the headers of safetensors files.

A folder must hold one set of weights; of two, transformers and Convoy might load different ones.
A header is accepted only where it follows the format (github.com/huggingface/safetensors), because
conversion maps its tensors without further checks. Standard library only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from training.errors import ConfigError
from training.files import hf_folder
from training.files.hf_folder import AGAIN, shown

BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
"""Bytes of an element, by safetensors' names of data types."""
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
KINDS = ((SAFETENSORS, f"{SAFETENSORS}.index.json"), (BIN, f"{BIN}.index.json"))
HEADER_MAX = 2**25
"""Bytes of the longest header that is read; the format's own limit is three times that,
BLOOM-176B's have 0.2 MB."""
DIMENSIONS, LENGTH = 8, 2**40
"""Most dimensions of a tensor, and the longest one."""


class Tensor(NamedTuple):
    path: Path
    dtype: str
    sizes: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    bytes: int


class Weights(NamedTuple):
    """One set of weights."""

    files: list[Path]
    """The files, sorted by name."""
    places: dict[str, str]
    """Tensor -> file name, as the index has it; {} without an index."""
    notes: list[str]
    """Facts to show to the user that are no mistakes."""


def find(folder: str | Path) -> Weights:
    """Find the folder's one set of weights, as transformers does: safetensors before .bin.

    Raises ConfigError where there is none, where there are two, and where an index names a file
    that is missing or is not in the folder.
    """
    folder = Path(folder)
    if hf_folder.file(folder, "adapter_config.json", links=True):
        raise ConfigError(
            f"model.checkpoint: {folder} holds an adapter (adapter_config.json), which transformers "
            "would add to the weights and training would not; merge it first (peft: "
            "model.merge_and_unload().save_pretrained(...)), or remove it"
        )
    for number, (single, index) in enumerate(KINDS):
        single_file, index_file = hf_folder.file(folder, single, links=True), hf_folder.file(folder, index)
        if not single_file and not index_file:
            continue
        places = _places(folder, index) if index_file else {}
        if single_file and index_file and set(places.values()) != {single}:
            raise ConfigError(
                f"model.checkpoint: {folder} holds two sets of weights: {single}, which transformers "
                f"loads, and the shards of {index}; remove the set that is not the model's"
            )
        names = sorted(set(places.values())) or [single]
        files = [_shard(folder, name, index, names) for name in names]
        notes = [f"{path} is a link to {path.resolve()}" for path in files if hf_folder.outside(folder, path)]
        if not number and any((folder / other).exists() for other in KINDS[1]):
            notes.append(f"{folder} holds {BIN} as well as {SAFETENSORS}: nothing reads {BIN}")
        return Weights(files, places, notes)
    raise ConfigError(
        f"model.checkpoint: no weights in {folder}: expected {SAFETENSORS}, or {BIN}, or several of "
        "either with their .index.json; download the whole repository of the model, or save it with "
        "model.save_pretrained(folder, safe_serialization=True)"
    )


def _places(folder: Path, index: str) -> dict[str, str]:
    """Tensor -> file name of an index. Raises ConfigError for a name that no file of the folder can
    have."""
    table = (hf_folder.json_object(folder, index) or {}).get("weight_map")
    ending = Path(index.removesuffix(".index.json")).suffix
    if not isinstance(table, dict) or not table:
        raise ConfigError(
            f"model.checkpoint: {folder / index} has no weight_map "
            f"from tensors to files: it is no index of shards; {AGAIN}"
        )
    for tensor, name in table.items():
        plain = isinstance(name, str) and name.isprintable() and len(name) < 256 and "/" not in name
        if not plain or not name.endswith(ending):
            raise ConfigError(
                f"model.checkpoint: {folder / index}: weight_map says that {shown(tensor)} is in "
                f"{shown(repr(name))}; expected the name of a file of the folder that ends with {ending}; {AGAIN}"
            )
    return table


def _shard(folder: Path, name: str, index: str, names: list[str]) -> Path:
    path = hf_folder.file(folder, name, links=True)
    if path is None:
        raise ConfigError(
            f"model.checkpoint: {folder}/{shown(name)} is missing, {index} names it (shard "
            f"{names.index(name) + 1} of {len(names)}); {AGAIN}"
        )
    return path


def read_header(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a safetensors file. Raises ConfigError where the header breaks the format
    or the file's length does not match it."""
    with open(path, "rb") as file:
        size, start = path.stat().st_size, file.read(8)
        if start == b"version ":
            raise ConfigError(
                f"model.checkpoint: {path} is a git-LFS pointer, not the weights; fetch them with `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= size - 8:
            needed = f", its header alone needs {8 + length:,}" if len(start) == 8 else ""
            raise ConfigError(
                f"model.checkpoint: {path} is truncated or no safetensors file: {size:,} bytes{needed}; {AGAIN}"
            )
        if length > HEADER_MAX:
            raise ConfigError(
                f"model.checkpoint: {path}: its header has {length:,} bytes, expected at most {HEADER_MAX:,}; {AGAIN}"
            )
        content = file.read(length)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"model.checkpoint: the header of {path} can't be read (not UTF-8 at byte {8 + error.start}); {AGAIN}"
        ) from None
    entries = hf_folder.parse(text, path.with_name(f"{path.name} (its header)"))
    notes = entries.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise ConfigError(
            f"model.checkpoint: the header of {path} can't be read (__metadata__ is no table of texts); {AGAIN}"
        )
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if tensor.start != end:
            raise ConfigError(
                f"model.checkpoint: {path}: {shown(name)} begins at byte {tensor.start - 8 - length:,} "
                f"of the data, expected {end - 8 - length:,}: tensors overlap or leave holes; {AGAIN}"
            )
        end += tensor.bytes
    if size != end:
        raise ConfigError(
            f"model.checkpoint: {path} is truncated or damaged: {size:,} bytes, its header says {end:,}; {AGAIN}"
        )
    return tensors


def _tensor(path: Path, name: str, entry, data: int) -> Tensor:
    """One entry of a header. ``data``: offset in the file at which the header's data begin."""

    def wrong(what: str, expected: str) -> ConfigError:
        return ConfigError(
            f"model.checkpoint: the header of {path} can't be read "
            f"({shown(name)}: {what}; expected {expected}); {AGAIN}"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong(shown(entry), "dtype, shape and data_offsets")
    dtype, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise wrong(f"dtype {shown(dtype)}", "the name of a type")
    if not _numbers(sizes) or len(sizes) > DIMENSIONS or any(number > LENGTH for number in sizes):
        raise wrong(f"shape {shown(sizes)}", f"at most {DIMENSIONS} whole numbers up to {LENGTH}")
    if not _numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"data_offsets {shown(offsets)}", "two whole numbers, first byte and end")
    size = offsets[1] - offsets[0]
    if dtype in BYTES and size != math.prod(sizes) * BYTES[dtype]:
        raise ConfigError(
            f"model.checkpoint: {path}: {shown(name)} is {dtype} "
            f"{sizes} but has {size} bytes; the file is damaged: {AGAIN}"
        )
    return Tensor(path, dtype, tuple(sizes), data + offsets[0], size)


def _numbers(values) -> bool:
    return isinstance(values, list) and all(type(number) is int and number >= 0 for number in values)
