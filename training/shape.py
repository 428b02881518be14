"""The model's shape, as Hugging Face's config.json states it, and which layouts it fits. Standard library only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from training.settings import ConfigError

VOCAB_MULTIPLE = 128
"""The embedding's rows are padded to a multiple of this times the tensor-parallel size (tensor cores, equal shards)."""
CHUNK_LOGITS = 2**29
"""Most logits of a rank that exist at once in training: 1 GiB in bf16, 2,139 tokens of BLOOM without tensor parallelism."""


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
    tied: bool = True
    """The output matrix is the embedding (all published BLOOMs); else the model has its own."""

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
        if raw.get("apply_residual_connection_post_layernorm", False) is not False:
            raise ConfigError(f"{path}: apply_residual_connection_post_layernorm = {raw['apply_residual_connection_post_layernorm']}; "
                              "only False is supported")
        tied = raw.get("tie_word_embeddings", True)
        if not isinstance(tied, bool):
            raise ConfigError(f"{path}: tie_word_embeddings = {tied!r}: expected true or false")
        numbers = {"layers": first("n_layer", "num_hidden_layers"), "hidden": first("hidden_size", "n_embed"),
                   "heads": first("n_head", "num_attention_heads"), "vocab": first("vocab_size")}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ConfigError(f"{path}: {name} = {number!r}: expected a whole number above 0")
        return cls(**numbers, eps=first("layer_norm_epsilon"), tied=tied)

    def check_layout(self, tensor_parallel_size: int, pipeline_parallel_size: int, virtual_pipeline_size: int = 1) -> None:
        """Raises ConfigError where the model can't be divided so; the message says which layouts exist."""
        if self.heads % tensor_parallel_size:
            fits = ", ".join(str(n) for n in range(1, self.heads + 1) if self.heads % n == 0)
            raise ConfigError(f"tensor_parallel = {tensor_parallel_size} does not divide the model's {self.heads} attention heads; "
                              f"choose one of {fits}")
        if virtual_pipeline_size > 1 and pipeline_parallel_size == 1:
            raise ConfigError(f"virtual_pipeline = {virtual_pipeline_size} needs pipeline_parallel > 1; set virtual_pipeline = 1")
        chunks = pipeline_parallel_size * virtual_pipeline_size
        if chunks > self.layers:
            what, fix = f"pipeline_parallel = {pipeline_parallel_size}", f"choose any from 1 to {self.layers}"
            if virtual_pipeline_size > 1:
                most = self.layers // pipeline_parallel_size
                what = f"{what} x virtual_pipeline = {virtual_pipeline_size} makes {chunks} parts, which"
                fix = f"choose a virtual_pipeline from 1 to {most}" if most else f"choose a pipeline_parallel from 1 to {self.layers}"
            raise ConfigError(f"{what} is more than the model's {self.layers} layers; {fix} (parts need not be equal)")

    def stage_layers(self, stages: int, head: str = "lm", least: int = 1) -> list[int]:
        """Layers of each pipeline stage: the split whose slowest stage is fastest, with at least ``least`` layers a stage.

        A stage's time is its layers' plus, on the last stage of a language model, the output matrix's: V / 12 H layers (its
        multiplications against the 12 H^2 of a layer; 5 layers of bloom-7b1, 20 of bloom-560m). The input embedding costs no time
        but the first stage's memory: what does not divide evenly goes to the stages after the first.
        """
        if stages == 1:
            return [self.layers]
        output = self.vocab / (12 * self.hidden) if head == "lm" else 0.0
        best: tuple[float, int] | None = None
        for last in range(least, self.layers - least * (stages - 1) + 1):
            slowest = max(last + output, -(-(self.layers - last) // (stages - 1)))
            # Of equals the fullest last stage: the others then hold less.
            if best is None or slowest <= best[0]:
                best = (slowest, last)
        assert best is not None, f"{self.layers} layers for {stages} stages of at least {least}"
        each, more = divmod(self.layers - best[1], stages - 1)
        return [each + (stage >= stages - 1 - more) for stage in range(stages - 1)] + [best[1]]

    def chunk_layers(self, pipeline_parallel_size: int, virtual_pipeline_size: int = 1, head: str = "lm") -> list[list[int]]:
        """Layers of each part of each pipeline stage. In the model's order: part 0 of every stage, then part 1 of every stage, ..."""
        parts = virtual_pipeline_size
        return [[layers // parts + (part < layers % parts) for part in range(parts)]
                for layers in self.stage_layers(pipeline_parallel_size, head, parts)]

    def parameters(self) -> int:
        """Parameters of the language model; a tied output matrix is the embedding. Vocabulary padding is not counted."""
        layer = 12 * self.hidden**2 + 13 * self.hidden
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.layers * layer + 4 * self.hidden

    def padded_vocab(self, tensor_parallel_size: int) -> int:
        multiple = VOCAB_MULTIPLE * tensor_parallel_size
        return -(-self.vocab // multiple) * multiple
