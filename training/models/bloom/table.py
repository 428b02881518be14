"""BLOOM (Le Scao et al. 2022): what its config.json says, and its tensors. Standard library only.

Query, key and value are fused per head as [head, (q, k, v), head_dim], which is megatron-core's
layout for ungrouped heads: conversion is renaming.
"""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import COMMON, FIX, NUMBER, ConfigFile
from training.config.shape import EMBEDDING, Shape, Table, Weight
from training.errors import ConfigError

HUGGING_FACE = "Bloom"
"""Begins the names of transformers' classes."""
PREFIX, LAYER = "transformer.", "h"
"""Of Hugging Face's names: what the transformer's begin with, and then a layer's, before its
number."""
UNUSED: tuple[str, ...] = ()
"""Ends of the names of tensors that transformers once saved and reads no more."""


def shape(layers: int, hidden: int, heads: int, vocab: int, norm_eps: float, tied: bool = True) -> Shape:
    return Shape(
        family="bloom",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden=4 * hidden,
        vocab=vocab,
        norm_eps=norm_eps,
        tied=tied,
        alibi=True,
    )


def read(config: ConfigFile) -> Shape:
    """Raises ConfigError, by name, for what we do not compute."""
    hidden, heads = config.whole_number("hidden_size", "n_embed"), config.whole_number("n_head", "num_attention_heads")
    config.only("apply_residual_connection_post_layernorm", False)
    config.only("quantization_config", None)
    config.types(
        {
            **COMMON,
            "hidden_dropout": NUMBER,
            "attention_dropout": NUMBER,
            "pretraining_tp": (int,),
            "slow_but_exact": (bool,),
        }
    )
    if hidden % heads:
        raise ConfigError(
            f"{config.path}: hidden_size = {hidden} and n_head = {heads}: expected a multiple of the heads; {FIX}"
        )
    return shape(
        config.whole_number("n_layer", "num_hidden_layers"),
        hidden,
        heads,
        config.whole_number("vocab_size"),
        config.epsilon("layer_norm_epsilon"),
        config.boolean("tie_word_embeddings", True),
    )


def table(shape: Shape) -> Table:
    hidden, wide = shape.hidden, shape.ffn_hidden

    def norm(key: str, name: str) -> list[Weight]:
        return [Weight(f"{key}.{part}", {f"{name}.{part}": (hidden,)}) for part in ("weight", "bias")]

    def linear(key: str, name: str, rows: int, columns: int, split: int) -> list[Weight]:
        # The biases of what is split by columns are added once, after the sum over ranks.
        return [
            Weight(f"{key}.weight", {f"{name}.weight": (rows, columns)}, split),
            Weight(f"{key}.bias", {f"{name}.bias": (rows,)}, 0 if split == 0 else None),
        ]

    return Table(
        first=(
            Weight(EMBEDDING, {"word_embeddings.weight": (shape.vocab, hidden)}, 0),
            *norm("embedding_layernorm", "word_embeddings_layernorm"),
        ),
        layer=(
            *norm("input_layernorm", "input_layernorm"),
            *linear("self_attention.linear_qkv", "self_attention.query_key_value", 3 * hidden, hidden, 0),
            *linear("self_attention.linear_proj", "self_attention.dense", hidden, hidden, 1),
            *norm("pre_mlp_layernorm", "post_attention_layernorm"),
            *linear("mlp.linear_fc1", "mlp.dense_h_to_4h", wide, hidden, 0),
            *linear("mlp.linear_fc2", "mlp.dense_4h_to_h", hidden, wide, 1),
        ),
        last=tuple(norm("decoder.final_layernorm", "ln_f")),
    )


def demo(model: ModelConfig) -> dict:
    """config.json with the keys of ``bigscience/bloom-7b1`` (which are older than those that
    transformers writes today)."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": model.demo_hidden,
        "n_inner": None,
        "n_layer": model.demo_layers,
        "num_attention_heads": model.demo_heads,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": model.demo_vocab,
    }
