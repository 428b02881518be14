"""Qwen 3 (Yang et al. 2025), dense: Llama's tensors, and an RMSNorm of each head's query and key,
which all heads share. Heads are head_dim wide, whatever hidden_size is. Standard library only."""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import ConfigFile
from training.config.shape import Shape
from training.models.llama import table as llama
from training.models.llama.table import LAYER, PREFIX, UNUSED, table

HUGGING_FACE = "Qwen3"

__all__ = ["HUGGING_FACE", "LAYER", "PREFIX", "UNUSED", "demo", "read", "table"]


def read(config: ConfigFile) -> Shape:
    """Raises ConfigError, by name, for what we do not compute."""
    config.only("attention_bias", False)
    llama.full_attention(config)
    return llama.shape(config, "qwen3", positions=32768, kv_heads=32, head_dim=128, qk_norm=True)


def demo(model: ModelConfig) -> dict:
    """config.json with the keys of ``Qwen/Qwen3-0.6B``: heads are twice as wide as hidden_size /
    num_attention_heads."""
    values = llama.demo(model)
    del values["mlp_bias"]
    return {
        **values,
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 2 * model.demo_hidden // model.demo_heads,
        "max_window_layers": model.demo_layers,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    }
