"""Small Hugging Face BLOOMs in which mistakes show: large initialisation, noisy biases and
norms."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BloomConfig, BloomForCausalLM


def tiny_bloom(
    folder: Path, heads: int = 8, hidden: int = 64, layers: int = 4, vocab: int = 300, seed: int = 0, tied: bool = True
) -> BloomForCausalLM:
    """Save a BLOOM to ``folder`` and return it. With initializer_range .02 tanh- and erf-GELU could
    not be told apart."""
    torch.manual_seed(seed)
    config = BloomConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        n_layer=layers,
        n_head=heads,
        initializer_range=0.15,
        use_cache=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=tied,
    )
    model = BloomForCausalLM(config).float().eval()
    return saved_with_noise(model, folder)


@torch.no_grad()
def saved_with_noise(model, folder: Path):
    """``model`` itself, saved to ``folder``, with noise in its biases and norms, which start as
    zeros and ones."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
