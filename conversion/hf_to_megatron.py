"""Hugging Face -> Megatron: ``python -m conversion.hf_to_megatron config.json``.

Tensor by tensor from memory-mapped safetensors into one ``torch_dist`` checkpoint, which every TP x PP x DP loads: no model
is built and no layout is baked in. Tensors keep their data type and their bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from megatron.core import dist_checkpointing

from conversion.config import ConvertConfig
from conversion.weights import HuggingFaceWeights, entries, sharded
from training import checkpoint
from training.config import ConfigError
from training.data.tokenizer import Tokenizer
from training.main import run_stage
from training.metrics import Metrics
from training.shape import BloomShape


def convert(config: ConvertConfig) -> None:
    """Write iteration 0 of the stage. Inside ``ranks(1, 1)``. Raises ConfigError before anything is written."""
    shape = BloomShape.read(config.paths.model)
    shape.check_layout(config.tensor_parallel, config.pipeline_parallel)
    weights = HuggingFaceWeights(config.paths.model, shape.layers)
    rows = weights["word_embeddings.weight"].size(0)
    if rows != shape.vocab:
        raise ConfigError(f"{config.paths.model}: word_embeddings has {rows} rows, config.json says vocab_size = {shape.vocab}")
    tokens = Tokenizer(config.paths.model).size if (Path(config.paths.model) / "tokenizer.json").is_file() else 0
    if tokens > rows:
        raise ConfigError(f"{config.paths.model}: the tokenizer has {tokens} tokens, the embedding only {rows} rows; "
                          "resize the embedding (model.resize_token_embeddings) or use the tokenizer that the model was trained with")
    tensors = {entry.name: sharded(entry, weights[entry.name], shape.layers) for entry in entries(shape.layers)}
    target = checkpoint.folder(config.paths.output, 0)
    aside = target.with_name(f".{target.name}.saving")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "model").mkdir(parents=True)
    dist_checkpointing.save(tensors, str(aside / "model"))
    checkpoint.publish(config.paths.output, aside, 0)
    metrics = Metrics(config.paths.output, total=len(tensors))
    size = sum(tensor.data.numel() * tensor.data.element_size() for tensor in tensors.values())
    metrics.log(len(tensors), ("gigabytes",), gigabytes=size / 1e9)
    metrics.close()


if __name__ == "__main__":
    sys.exit(run_stage(ConvertConfig, convert))
