"""Small Hugging Face Llamas in which mistakes show: large initialisation, noisy norms, an epsilon
and a rotary base of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.bloom import saved_with_noise


def tiny_llama(
    folder: Path,
    heads: int = 8,
    groups: int = 2,
    hidden: int = 64,
    layers: int = 4,
    vocab: int = 300,
    seed: int = 0,
    tied: bool = True,
    **values,
) -> LlamaForCausalLM:
    """Save a Llama to ``folder`` and return it. With an epsilon of 1e-6 another one could not be
    told apart."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden + 24,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        initializer_range=0.15,
        rms_norm_eps=0.03,
        use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **values,
    )
    model = LlamaForCausalLM(config).float().eval()
    return saved_with_noise(model, folder)
