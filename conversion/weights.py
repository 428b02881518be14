"""One table, read in both directions: which BLOOM tensor of Hugging Face is which of megatron-core.

BLOOM fuses query, key and value per head as [head, (q, k, v), head_dim], which is megatron-core's layout for ungrouped heads:
conversion is renaming. megatron-core stores one key for all layers, with the layer as a first axis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors import safe_open

from training.config import ConfigError

# megatron-core key -> Hugging Face name
TOP = {
    "embedding.word_embeddings.weight": "word_embeddings.weight",
    "embedding_layernorm.weight": "word_embeddings_layernorm.weight",
    "embedding_layernorm.bias": "word_embeddings_layernorm.bias",
    "decoder.final_layernorm.weight": "ln_f.weight",
    "decoder.final_layernorm.bias": "ln_f.bias",
}
LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
EMBEDDING = "embedding.word_embeddings.weight"
TIED_HEAD = "lm_head.weight"
PREFIX = "transformer."


class Entry(NamedTuple):
    """One tensor: ``key`` in the Megatron checkpoint (row ``layer`` of it, if any), ``name`` in Hugging Face without prefix."""

    key: str
    name: str
    layer: int | None


def entries(layers: int) -> Iterator[Entry]:
    for key, name in TOP.items():
        yield Entry(key, name, None)
    for layer in range(layers):
        for key, name in LAYER.items():
            for part in ("weight", "bias"):
                yield Entry(f"decoder.layers.{key}.{part}", f"h.{layer}.{name}.{part}", layer)


def sharded(entry: Entry, tensor: torch.Tensor, layers: int) -> ShardedTensor:
    """The tensor as its place in the Megatron checkpoint. The embedding's rows may differ: vocabulary padding."""
    offsets = [] if entry.layer is None else [(0, entry.layer, layers)]
    made = ShardedTensor.from_rank_offsets(entry.key, tensor, *offsets, prepend_axis_num=len(offsets), replica_id=0)
    made.allow_shape_mismatch = entry.key == EMBEDDING
    return made


class HuggingFaceWeights:
    """Tensors of a Hugging Face safetensors folder, memory-mapped, by name without prefix.

    Raises ConfigError where the folder has no safetensors, or its tensors are not exactly the table's.
    """

    def __init__(self, folder: str | Path, layers: int):
        folder = Path(folder)
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif single.is_file():
            with safe_open(single, "pt") as shard:
                files = dict.fromkeys(shard.keys(), single.name)
        else:
            raise ConfigError(f"model.checkpoint: {folder} has neither {index.name} nor {single.name}; "
                              "save it with model.save_pretrained(folder, safe_serialization=True)")
        missing = sorted(set(files.values()) - {path.name for path in folder.iterdir()})
        if missing:
            raise ConfigError(f"model.checkpoint: {index} names files that are not there: {', '.join(missing)}")
        self.folder, self.open = folder, {}
        self.places = {name.removeprefix(PREFIX): (name, file) for name, file in files.items() if name != TIED_HEAD}
        wanted = {entry.name for entry in entries(layers)}
        if self.places.keys() != wanted:
            raise ConfigError(f"model.checkpoint: {folder} does not hold the tensors of a BLOOM of {layers} layers; "
                              f"missing: {sorted(wanted - self.places.keys())[:5]}, unknown: {sorted(self.places.keys() - wanted)[:5]}")

    def __getitem__(self, name: str) -> torch.Tensor:
        stored, file = self.places[name]
        if file not in self.open:
            self.open[file] = safe_open(self.folder / file, "pt")
        return self.open[file].get_tensor(stored)
