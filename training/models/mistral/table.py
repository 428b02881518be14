"""Mistral (Jiang et al. 2023) without a window: 7B from v0.2 on, and Nemo, whose heads are not
hidden_size / num_attention_heads wide. Standard library only."""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import ConfigFile
from training.config.shape import Shape
from training.models.llama import table as llama
from training.models.llama.table import LAYER, PREFIX, UNUSED, table

HUGGING_FACE = "Mistral"

__all__ = ["HUGGING_FACE", "LAYER", "PREFIX", "UNUSED", "demo", "read", "table"]


def read(config: ConfigFile) -> Shape:
    """Raises ConfigError, by name, for what we do not compute."""
    config.only("layer_types", None)
    # transformers takes a missing one for 4096: a file must say that there is none
    if "sliding_window" not in config.values or config.values["sliding_window"] is not None:
        window = config.values.get("sliding_window", "not there (4096 in transformers)")
        raise config.wrong("sliding_window", window, "null", "take a model without windows, such as v0.3")
    return llama.shape(config, "mistral", positions=131072, kv_heads=8)


def demo(model: ModelConfig) -> dict:
    """config.json with the keys of ``mistralai/Mistral-Nemo-Base-2407``: heads are twice as wide as
    hidden_size / num_attention_heads."""
    values = llama.demo(model)
    for name in ("attention_bias", "mlp_bias", "rope_scaling"):
        del values[name]
    return {
        **values,
        "architectures": ["MistralForCausalLM"],
        "head_dim": 2 * model.demo_hidden // model.demo_heads,
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
    }
