"""Qwen 2's modules are Llama's; megatron-core's attention adds the biases."""

from training.models.llama import module
from training.models.llama.module import FeedForward

SETTINGS = {**module.SETTINGS, "add_qkv_bias": True}

__all__ = ["SETTINGS", "FeedForward"]
