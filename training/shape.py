"""The model's shape, as Hugging Face's config.json states it, and which layouts it fits. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from training.config import ConfigError

VOCAB_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this times the tensor-parallel size (tensor cores, equal shards)."""


@dataclass(frozen=True)
class BloomShape:
    """What Hugging Face's config.json says of the model; the only place the shape comes from."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    """Rows of the embedding in the Hugging Face checkpoint."""
    eps: float
    """Epsilon of the layer norms."""

    @classmethod
    def read(cls, folder: str | Path) -> BloomShape:
        """Raises ConfigError where the folder is no BLOOM or one that we do not compute exactly."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ConfigError(f"model.checkpoint: {path} is missing; expected a Hugging Face folder with config.json")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from None

        def first(*names):
            for name in names:
                if name in raw:
                    return raw[name]
            raise ConfigError(f"{path}: none of {', '.join(names)} is there; is it a BLOOM?")

        if first("model_type") != "bloom":
            raise ConfigError(f"{path}: model_type = {raw['model_type']!r}; expected 'bloom'")
        for flag, wanted in (("apply_residual_connection_post_layernorm", False), ("tie_word_embeddings", True)):
            if flag in raw and raw[flag] is not wanted:
                raise ConfigError(f"{path}: {flag} = {raw[flag]}; only {wanted} is supported")
        numbers = {"layers": first("n_layer", "num_hidden_layers"), "hidden": first("hidden_size", "n_embed"),
                   "heads": first("n_head", "num_attention_heads"), "vocab": first("vocab_size")}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"{path}: {name} = {number!r}: expected a whole number above 0")
        return cls(**numbers, eps=first("layer_norm_epsilon"))

    def check_layout(self, tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
        """Raises ConfigError where the layout does not divide the model."""
        for what, number, by, key in (("attention heads", self.heads, tensor_parallel_size, "tensor_parallel"),
                                      ("layers", self.layers, pipeline_parallel_size, "pipeline_parallel")):
            if number % by:
                fits = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
                raise ConfigError(f"{key} = {by} does not divide the model's {number} {what}; choose one of {fits}")

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        multiple = VOCAB_MULTIPLE * tensor_parallel_size
        return -(-self.vocab // multiple) * multiple
