"""Qwen 2's part of the rollout engine is Llama's."""

from training.models.llama.decoder import Decoder

__all__ = ["Decoder"]
