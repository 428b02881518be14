"""Small Hugging Face models of Llama's kind in which mistakes show: large initialisation, noisy
norms and biases, an epsilon and a rotary base of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.bloom import saved_with_noise

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
DEFAULT = {"rope_type": "default", "rope_theta": 50.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Heads of 8 have wavelengths of 6 to 118 positions: below 16 one stays, above 64 one is stretched,
the others are interpolated."""


def tiny(
    family: str,
    folder: Path,
    heads: int = 8,
    groups: int = 2,
    hidden: int = 64,
    layers: int = 4,
    vocab: int = 300,
    seed: int = 0,
    tied: bool = True,
    rope: dict = DEFAULT,
    **values,
):
    """Save a model of ``family`` to ``folder`` and return it. With an epsilon of 1e-6 another one
    could not be told apart."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[family]
    if family == "mistral":
        values = {"sliding_window": None, **values}
    config = config_class(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden + 24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        initializer_range=0.15,
        rms_norm_eps=0.03,
        use_cache=False,
        rope_parameters=dict(rope),
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **values,
    )
    return saved_with_noise(model_class(config).float().eval(), folder)


tiny_llama = partial(tiny, "llama")
tiny_llama3 = partial(tiny, "llama", rope=LLAMA3)
tiny_mistral = partial(tiny, "mistral", tied=False)
tiny_qwen2 = partial(tiny, "qwen2")
tiny_qwen3 = partial(tiny, "qwen3")
