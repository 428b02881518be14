"""Mistral's modules are Llama's."""

from training.models.llama.module import SETTINGS, FeedForward

__all__ = ["SETTINGS", "FeedForward"]
