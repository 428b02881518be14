"""Qwen 2 (Yang et al. 2024) and Qwen 2.5: Llama's tensors, and biases on query, key and value,
which are woven by key-value head as the matrices are. Standard library only."""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import ConfigFile
from training.config.shape import Shape, Table
from training.models.llama import table as llama
from training.models.llama.table import LAYER, PREFIX, UNUSED

HUGGING_FACE = "Qwen2"

__all__ = ["HUGGING_FACE", "LAYER", "PREFIX", "UNUSED", "demo", "read", "table"]


def read(config: ConfigFile) -> Shape:
    """Raises ConfigError, by name, for what we do not compute."""
    llama.full_attention(config)
    config.only("use_mrope", False)
    return llama.shape(config, "qwen2", positions=32768, kv_heads=32)


def table(shape: Shape) -> Table:
    return llama.table(shape, qkv_bias=True)


def demo(model: ModelConfig) -> dict:
    """config.json with the keys of ``Qwen/Qwen2.5-0.5B``."""
    values = llama.demo(model)
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del values[name]
    return {
        **values,
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": model.demo_layers,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_mrope": False,
        "use_sliding_window": False,
    }
