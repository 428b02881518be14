"""Megatron -> Hugging Face: ``python -m conversion.megatron_to_hf config.json``.

Writes one folder a model (sft, rlhf) that transformers loads: sharded safetensors with index, and config, generation config
and tokenizer of the starting checkpoint. Vocabulary padding is cut off; everything else keeps its bits.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file

from conversion.config import ExportConfig
from conversion.weights import EMBEDDING, PREFIX, Entry, HuggingFaceWeights, entries, sharded
from training import checkpoint
from training.config import ConfigError
from training.main import run_stage
from training.metrics import Metrics
from training.shape import BloomShape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja")
POLICY = {"sft": "model", "rlhf": "policy"}
"""Name of the language model's folder in each stage's checkpoint."""


def export(config: ExportConfig) -> None:
    """Write every model's folder. Inside ``ranks(1, 1)``."""
    shape = BloomShape.read(config.paths.model)
    dtype = DTYPES[config.dtype] if config.dtype else HuggingFaceWeights(config.paths.model, shape.layers)["ln_f.weight"].dtype
    metrics = Metrics(config.paths.output, total=len(config.paths.checkpoints))
    for number, (name, stage) in enumerate(config.paths.checkpoints.items(), 1):
        source, target = checkpoint.resolve(stage) / POLICY[name], Path(config.paths.output) / name
        export_model(source, target, Path(config.paths.model), shape, dtype, config.max_shard_gb)
        metrics.log(number)
        print(f"{name}: {source} -> {target}", flush=True)
    metrics.close()


def export_model(source: Path, target: Path, model: Path, shape: BloomShape, dtype: torch.dtype, max_shard_gb: float) -> None:
    """One model; ``target`` appears when it is complete."""
    aside = target.with_name(f".{target.name}.saving")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    shards = plan_shards(source, shape, dtype, max_shard_gb)
    places = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = read(source, shard, shape)
        save_file({PREFIX + name: tensor.to(dtype) for name, tensor in tensors.items()}, aside / file, metadata={"format": "pt"})
        places.update(dict.fromkeys((PREFIX + name for name in tensors), file))
    if len(shards) > 1:
        size = sum((aside / file).stat().st_size for file in set(places.values()))
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name in COPIED:
        if (model / name).is_file():
            shutil.copyfile(model / name, aside / name)
    set_dtype(aside / "config.json", dtype)
    shutil.rmtree(target, ignore_errors=True)
    aside.replace(target)


def set_dtype(path: Path, dtype: torch.dtype) -> None:
    """Say in config.json which type the weights have, where the copied file says another one."""
    config, name = json.loads(path.read_text(encoding="utf-8")), str(dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        if key in config and config[key] != name:
            config[key] = name
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


Stored = tuple[Entry, tuple[int, ...], torch.dtype]
"""A tensor with its shape and the type it has in the Megatron checkpoint."""


def plan_shards(source: Path, shape: BloomShape, dtype: torch.dtype, max_shard_gb: float) -> list[list[Stored]]:
    """The tensors of each file. A Megatron key (all its layers) is read whole, so it is never split."""
    stored = dist_checkpointing.load_tensors_metadata(str(source))
    by_key: dict[str, list] = {}
    for entry in entries(shape.layers):
        if entry.key not in stored:
            raise ConfigError(f"{source}: {entry.key} is missing; is it a checkpoint of this model?")
        size = tuple(stored[entry.key].global_shape[0 if entry.layer is None else 1 :])
        size = (shape.vocab, *size[1:]) if entry.key == EMBEDDING else size
        by_key.setdefault(entry.key, []).append((entry, size, stored[entry.key].dtype))
    shards: list[list] = [[]]
    filled = 0
    for group in by_key.values():
        size = sum(torch.Size(shape_).numel() for _, shape_, _ in group) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_gb * 1e9:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def read(source: Path, shard: list[Stored], shape: BloomShape) -> dict[str, torch.Tensor]:
    """Tensors of one file by Hugging Face name."""
    wanted = {entry.name: sharded(entry, torch.empty(size, dtype=dtype), shape.layers) for entry, size, dtype in shard}
    # Nested, because the loaded dictionary also holds what the checkpoint has beside tensors (the optimizer's groups).
    return dist_checkpointing.load({"model": wanted}, str(source), validate_access_integrity=False)["model"]


if __name__ == "__main__":
    sys.exit(run_stage(ExportConfig, export))
