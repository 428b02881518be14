"""One table, read in both directions: which BLOOM tensor of Hugging Face is which of megatron-core.

BLOOM fuses query, key and value per head as [head, (q, k, v), head_dim], which is megatron-core's layout for ungrouped heads:
conversion is renaming. megatron-core stores one key for all layers, with the layer as a first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from training.settings import ConfigError
from training.shape import BloomShape

# megatron-core key -> Hugging Face name
TOP = {
    "embedding.word_embeddings.weight": "word_embeddings.weight",
    "embedding_layernorm.weight": "word_embeddings_layernorm.weight",
    "embedding_layernorm.bias": "word_embeddings_layernorm.bias",
}
LAYER = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "self_attention.query_key_value",
    "self_attention.linear_proj": "self_attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}
END = {
    "decoder.final_layernorm.weight": "ln_f.weight",
    "decoder.final_layernorm.bias": "ln_f.bias",
}
# What stands on top of the transformer, for each kind of model. A tied head is the embedding and has no tensor of its own.
HEADS = {
    "tied": {},
    "untied": {"output_layer.weight": "lm_head.weight"},
    "scalar": {"score.linear.weight": "score.weight", "score.linear.bias": "score.bias"},
}
EMBEDDING = "embedding.word_embeddings.weight"
TIED_HEAD = "lm_head.weight"
VOCABULARY = ("word_embeddings.weight", "lm_head.weight")
"""Tensors with a row a token: padded for tensor parallelism."""
PREFIX = "transformer."
# The axis that tensor parallelism splits; what is not here is the same on every rank.
SPLIT = {"word_embeddings.weight": 0, "lm_head.weight": 0, "self_attention.query_key_value.weight": 0,
         "self_attention.query_key_value.bias": 0, "self_attention.dense.weight": 1, "mlp.dense_h_to_4h.weight": 0,
         "mlp.dense_h_to_4h.bias": 0, "mlp.dense_4h_to_h.weight": 1}


class Entry(NamedTuple):
    """One tensor: ``key`` in the Megatron checkpoint (row ``layer`` of it, if any), ``name`` in Hugging Face without prefix."""

    key: str
    name: str
    layer: int | None

    @property
    def axis(self) -> int | None:
        """The axis that tensor parallelism splits."""
        return SPLIT.get(self.name if self.layer is None else self.name.split(".", 2)[2])


def entries(layers: int, head: str = "tied") -> Iterator[Entry]:
    """The table for a model, in the model's order. ``head``: "tied", "untied" or "scalar"."""
    for key, name in TOP.items():
        yield Entry(key, name, None)
    for layer in range(layers):
        for key, name in LAYER.items():
            for part in ("weight", "bias"):
                yield Entry(f"decoder.layers.{key}.{part}", f"h.{layer}.{name}.{part}", layer)
    for key, name in (END | HEADS[head]).items():
        yield Entry(key, name, None)


def head_of(shape: BloomShape) -> str:
    return "tied" if shape.tied else "untied"


def stored_name(name: str) -> str:
    """The name in a Hugging Face file: what is part of the transformer has its prefix."""
    return name if name.startswith(("lm_head.", "score.")) else PREFIX + name


def size_of(entry: Entry, shape: BloomShape) -> tuple[int, ...]:
    """Shape of a tensor in Hugging Face."""
    hidden = shape.hidden
    sizes = {"word_embeddings.weight": (shape.vocab, hidden), "lm_head.weight": (shape.vocab, hidden), "score.weight": (1, hidden),
             "score.bias": (1,), "self_attention.query_key_value.weight": (3 * hidden, hidden),
             "self_attention.query_key_value.bias": (3 * hidden,), "self_attention.dense.weight": (hidden, hidden),
             "mlp.dense_h_to_4h.weight": (4 * hidden, hidden), "mlp.dense_h_to_4h.bias": (4 * hidden,),
             "mlp.dense_4h_to_h.weight": (hidden, 4 * hidden)}
    return sizes.get(entry.name if entry.layer is None else entry.name.split(".", 2)[2], (hidden,))


def check_names(found: Iterable[str], wanted: Iterable[str], where, layers: int) -> None:
    """Raises ConfigError unless the tensors are exactly the table's."""
    found, wanted = set(found), set(wanted)
    if found != wanted:
        raise ConfigError(f"{where} does not hold the tensors of a BLOOM of {layers} layers; missing: {sorted(wanted - found)[:5]}, "
                          f"unknown: {sorted(found - wanted)[:5]}")
