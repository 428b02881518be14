"""megatron-core's ``torch_dist`` checkpoints, piece by piece and without a process group.

The folder is one of torch.distributed.checkpoint: ``.metadata`` lists every chunk of every tensor
with its place in the ``*.distcp`` files, where each chunk is an ordinary torch.save. megatron-core
itself can only read and write whole keys (a key is a tensor of all layers: 4 GB for 7b1) and copies
them; here a chunk is mapped or written at a time.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from conversion.tensors import Merged, Piece, Rows, Stored, mapped, raw, view
from conversion.weights import Entry, entries
from training.checkpoint import safe_unpickle
from training.config.shape import OUTPUT, SCORE, Shape
from training.errors import ConfigError

FILE_BYTES = 1 << 30
"""Tensors are dealt out to files of about this size, which are written in parallel."""


def metadata(folder: Path) -> Metadata:
    """What the folder says of its tensors; read by an allow-list, never by plain pickle."""
    path = Path(folder) / ".metadata"
    if not path.is_file():
        raise ConfigError(f"{folder} is no Megatron checkpoint: {path} is missing")
    with open(path, "rb") as file:
        return safe_unpickle.load(file)


def head_in(folder: Path) -> str:
    """The kind of head that a checkpoint holds."""
    keys = metadata(folder).state_dict_metadata
    return "untied" if OUTPUT in keys else "scalar" if SCORE in keys else "tied"


def read(folder: str | Path, shape: Shape, head: str) -> dict[str, Rows]:
    """Tensors by Hugging Face name, vocabulary padding cut off, low-rank adapters merged. Raises
    ConfigError where they are not those of ``shape``."""
    folder, described = Path(folder), metadata(Path(folder))
    chunks: dict[str, list] = {}
    for place, where in described.storage_data.items():
        chunks.setdefault(place.fqn, []).append((tuple(place.offset or ()), where))
    maps, unsharded, tensors = {}, {}, {}
    table = list(entries(shape, head))
    missing = [entry.key for entry in table if entry.key not in described.state_dict_metadata]
    if missing:
        raise ConfigError(f"{folder}: {missing[0]} is missing; is it a checkpoint of this model?")
    check_unused(folder, described, {key for entry in table for key in (entry.key, *adapters(entry))}, shape)

    def stored(key: str, layer: int | None) -> Stored:
        if key not in unsharded:
            unsharded[key] = _stored(folder, described.state_dict_metadata[key], chunks[key], maps)
        return unsharded[key] if layer is None else _layer(folder, unsharded[key], key, layer, shape.layers)

    for entry in table:
        tensor = stored(entry.key, entry.layer)
        rows = entry.weight.size
        if entry.vocabulary and tensor.shape[0] > rows[0]:
            tensor = tensor.part(0, 0, rows[0])
        if tensor.shape != rows:
            raise ConfigError(
                f"{folder}: {entry.key} has shape {list(tensor.shape)}, the model's config.json says {list(rows)}"
            )
        if not tensor.complete:
            raise ConfigError(
                f"{folder}: a part of {entry.key} is in none of its files: the checkpoint is not complete"
            )
        if any(key in described.state_dict_metadata for key in adapters(entry)):
            a, b, scale = (stored(key, entry.layer).load() for key in adapters(entry))
            tensor = Merged(tensor.shape, tensor.dtype, tensor.pieces, a, b, scale.item())
        tensors |= entry.unwoven(tensor)
    return tensors


def adapters(entry: Entry) -> tuple[str, ...]:
    """Keys of A, B and the scale that a layer's matrix may have beside it
    (training/models/lora.py)."""
    stem = entry.key.removesuffix(".weight")
    return (
        () if entry.layer is None or stem == entry.key else tuple(f"{stem}.lora_{part}" for part in ("a", "b", "scale"))
    )


def sources(folder: Path, shape: Shape, head: str) -> dict[str, set[str]]:
    """Hugging Face name -> names of the files that the tensor lies in."""
    described = metadata(folder)
    keyed = {key for entry in entries(shape, head) if entry.layer is not None for key in (entry.key, *adapters(entry))}
    places: dict[tuple[str, int | None], set[str]] = {}
    for key, tensor in described.state_dict_metadata.items():
        for chunk in getattr(tensor, "chunks", ()):
            first, where = chunk.offsets[0], described.storage_data[MetadataIndex(key, chunk.offsets)].relative_path
            for layer in range(first, first + chunk.sizes[0]) if key in keyed else (None,):
                places.setdefault((key, layer), set()).add(where)
    return {
        name: set().union(*(places.get((key, entry.layer), ()) for key in (entry.key, *adapters(entry))))
        for entry in entries(shape, head)
        for name in entry.parts
    }


def check_unused(folder: Path, described: Metadata, used: set[str], shape: Shape) -> None:
    """Raises ConfigError for a weight that the table does not name. The optimizer's tensors are not
    weights."""
    unknown = [
        key
        for key in described.state_dict_metadata
        if key not in used and not key.startswith(("optimizer.", "chained_"))
    ]
    if unknown:
        raise ConfigError(
            f"{folder}: {unknown[0]} is no tensor of a {shape.family} with this head and would be lost; "
            f"unknown: {unknown[:5]}"
        )


def _layer(folder: Path, tensor: Stored, key: str, layer: int, layers: int) -> Stored:
    if tensor.shape[0] != layers:
        raise ConfigError(f"{folder}: {key} has {tensor.shape[0]} layers, the model's config.json says {layers}")
    return tensor.layer(layer)


def _stored(folder: Path, described: TensorStorageMetadata, places: list, maps: dict) -> Stored:
    sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in described.chunks}
    pieces = []
    for offset, where in places:
        if where.relative_path not in maps:
            path = folder / where.relative_path
            if Path(where.relative_path).name != where.relative_path or not path.is_file():
                raise ConfigError(f"{path} is missing, but the checkpoint's .metadata names it")
            maps[where.relative_path] = mapped(path)
        file, dtype = maps[where.relative_path], described.properties.dtype
        start, length = _payload(file, where.offset, where.length, folder / where.relative_path)
        shape = sizes[offset]
        if length != torch.Size(shape).numel() * dtype.itemsize:
            raise ConfigError(
                f"{folder / where.relative_path}: a chunk of shape {list(shape)} has {length} bytes: damaged"
            )
        pieces.append(Piece(offset, view(file, dtype, shape, start)))
    return Stored(tuple(described.size), described.properties.dtype, tuple(pieces))


class _Window(io.RawIOBase):
    """A part of a mapped file as a file."""

    def __init__(self, mapping, start: int, length: int):
        self.mapping, self.start, self.length, self.position = mapping, start, length, 0

    def seekable(self):
        return True

    def readable(self):
        return True

    def tell(self):
        return self.position

    def seek(self, offset, whence=0):
        self.position = offset + (0, self.position, self.length)[whence]
        return self.position

    def readinto(self, buffer):
        chunk = self.mapping[self.start + self.position : self.start + min(self.position + len(buffer), self.length)]
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


def _payload(mapping, start: int, length: int, path: Path) -> tuple[int, int]:
    """(position in the file, bytes) of the values of the one tensor in the torch.save that lies at
    ``start``."""
    if start + length > len(mapping):
        raise ConfigError(f"{path} is truncated: {len(mapping):,} bytes, a chunk ends at {start + length:,}")
    try:
        archive = zipfile.ZipFile(_Window(mapping, start, length))
        order = [archive.read(info) for info in archive.infolist() if info.filename.endswith("/byteorder")]
    except (zipfile.BadZipFile, zlib.error, struct.error, ValueError, NotImplementedError, EOFError) as error:
        raise ConfigError(f"{path} is damaged: no tensor at byte {start:,} ({error})") from None
    data = [info for info in archive.infolist() if "/data/" in info.filename]
    if len(data) != 1 or data[0].compress_type != zipfile.ZIP_STORED or order != [b"little"]:
        raise ConfigError(f"{path}: at byte {start:,} is not one plain tensor")
    # a zip's local header: 30 bytes, its name and extra fields, then the values
    local = start + data[0].header_offset
    name, extra = (int.from_bytes(mapping[local + at : local + at + 2], "little") for at in (26, 28))
    return local + 30 + name + extra, data[0].file_size


class Part(NamedTuple):
    """One tensor on its way into a file."""

    entry: Entry
    tensor: Rows


def plan(tensors: dict[str, Rows], shape: Shape, head: str) -> dict[str, list[Part]]:
    """File name -> tensors in it, in the model's order. Raises ConfigError where layers differ in
    type: a key has one."""
    parts = [Part(entry, entry.woven(tensors)) for entry in entries(shape, head)]
    types: dict[str, torch.dtype] = {}
    for entry, tensor in parts:
        if types.setdefault(entry.key, tensor.dtype) != tensor.dtype:
            raise ConfigError(
                f"{next(iter(entry.parts))} is {tensor.dtype}, in layer 0 it is {types[entry.key]}; "
                "save the model in one type (model.to(torch.bfloat16).save_pretrained)"
            )
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        size = part.tensor.nbytes
        if shards[-1] and filled + size > FILE_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return {f"__0_{number}.distcp": shard for number, shard in enumerate(shards)}


def write(parts: list[Part], file: BinaryIO, count) -> list[dict]:
    """Write the tensors as chunks -> what .metadata will say of them. ``count(bytes)`` is called as
    they are written."""
    placed = []
    for entry, tensor in parts:
        row = 0
        for block in tensor.blocks():
            # torch.save writes the whole storage: by way of numpy this one is the block alone, and
            # still no copy.
            values = (
                torch.from_numpy(raw(block).numpy())
                .view(block.dtype)
                .view((*(1,) * (entry.layer is not None), *block.shape))
            )
            start = file.tell()
            torch.save(values, file)
            lead = () if entry.layer is None else (entry.layer,)
            placed.append(
                {
                    "key": entry.key,
                    "offset": [*lead, row, *[0] * (block.dim() - 1)],
                    "size": list(values.shape),
                    "start": start,
                    "length": file.tell() - start,
                }
            )
            row += block.shape[0]
            count(block.nbytes)
    return placed


def finish(folder: Path, files: dict[str, list[dict]], tensors: dict[str, Rows], shape: Shape, head: str) -> None:
    """Write ``.metadata`` and the two small files of a megatron-core checkpoint. The same input
    gives the same bytes."""
    described, places = {}, {}
    for entry in entries(shape, head):
        tensor = entry.woven(tensors)
        size = tensor.shape if entry.layer is None else (shape.layers, *tensor.shape)
        described[entry.key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(size), [])
    for file, placed in files.items():
        for chunk in placed:
            offset, size = torch.Size(chunk["offset"]), torch.Size(chunk["size"])
            described[chunk["key"]].chunks.append(ChunkStorageMetadata(offset, size))
            places[MetadataIndex(chunk["key"], offset)] = _StorageInfo(file, chunk["start"], chunk["length"])
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(described, None, places, StorageMeta()), file)
    (folder / "metadata.json").write_text(
        json.dumps(
            {
                "sharded_backend": "torch_dist",
                "sharded_backend_version": 1,
                "common_backend": "torch",
                "common_backend_version": 1,
            }
        ),
        encoding="utf-8",
    )
    torch.save({}, folder / "common.pt")
