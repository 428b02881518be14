"""Configuration of the two conversion stages, standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvertPaths:
    output: str
    """The stage's folder; the Megatron checkpoint goes to checkpoints/iter_0000000/model."""
    model: str
    """Hugging Face folder to read."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Section ``convert``: Hugging Face -> Megatron. The checkpoint fits any layout; the one asked
    for is checked here."""

    paths: ConvertPaths
    tensor_parallel: int = 1
    """Tensor-parallel size that the heads, the feed-forward width and the padded vocabulary must
    divide by."""
    pipeline_parallel: int = 1
    """Pipeline-parallel size: at most the number of layers."""

    def __post_init__(self):
        for name in ("tensor_parallel", "pipeline_parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: expected at least 1")


FOLDERS = {"sft": "model", "dpo": "model", "rlhf": "policy", "grpo": "policy", "reward": "model", "value": "value"}
"""Name of each model that can be exported -> name of its folder in the stage's checkpoint."""


@dataclass(frozen=True)
class ExportPaths:
    output: str
    """The stage's folder; one Hugging Face folder a model below it."""
    model: str
    """Hugging Face folder of the starting model: config, generation config and tokenizer are copied
    from it."""
    checkpoints: dict
    """Name of each model to export -> stage folder that holds it, e.g. {"sft": ".../sft", "rlhf":
    ".../rlhf"}; "reward" and "value" (of rlhf) become sequence classifiers."""
    reward_iteration: int = 0
    """Iteration of the reward model to export; 0 = its last."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Section ``export``: Megatron -> Hugging Face safetensors."""

    paths: ExportPaths
    max_shard_gb: float = 2.0
    """Largest safetensors file, GB (1e9 bytes)."""
    heads: bool = True
    """Also export the reward and the value model, as sequence classifiers."""
    dtype: str = ""
    """"bf16", "fp16", "fp32", or "" for the data type of the starting checkpoint."""

    def __post_init__(self):
        unknown = self.paths.checkpoints.keys() - set(FOLDERS)
        if unknown:
            raise ValueError(f"paths.checkpoints.{min(unknown)}: expected one of {', '.join(FOLDERS)}")
        if self.dtype not in ("", "bf16", "fp16", "fp32"):
            raise ValueError(
                f'dtype = {self.dtype!r}: expected "bf16", "fp16", "fp32" or "" (as the starting checkpoint)'
            )
        if not self.max_shard_gb > 0:
            raise ValueError(f"max_shard_gb = {self.max_shard_gb}: expected above 0")
