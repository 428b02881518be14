"""Qwen 3's modules are Llama's; Shape.qk_norm adds the norms of query and key to the attention."""

from training.models.llama.module import SETTINGS, FeedForward

__all__ = ["SETTINGS", "FeedForward"]
