"""What the parts of benchmarks/multi_gpu/suite.py share: shapes, the same weights and rows at every
layout, a layout's configuration."""

from __future__ import annotations

import json
import zlib

import torch
from megatron.core import parallel_state

from benchmarks.training.train import CUDA, SHAPES
from training.config.shape import EMBEDDING, OUTPUT, Shape
from training.config.trainers import Paths, SFTConfig
from training.distributed import groups
from training.generation.weight_sync import named_weights
from training.models.bloom.table import shape as bloom
from training.trainer.step import Batch

# heads of 64 are the fewest that GPUs were tried with
SHAPES = {
    **SHAPES,
    "tiny": bloom(8, 512 if CUDA else 64, 8, 1000, 1e-5),
}


def say(**values) -> None:
    """One JSON line, by rank 0."""
    if groups.is_main():
        rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        print(json.dumps(rounded), flush=True)


def length(size: str) -> int:
    """Tokens of a row."""
    return 128 if size == "tiny" else 2048


def settings(size: str, **values) -> SFTConfig:
    """``values``: the layout's keys among them."""
    defaults = dict(
        precision="bf16" if CUDA else "fp32", seq_length=length(size), iterations=1000, warmup_iterations=0, lr=1e-5
    )
    return SFTConfig(paths=Paths("", "", "", "", ""), **defaults | values)


def whole_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Size of every tensor of a language or reward model, by its name in the whole model."""
    table = shape.table
    layers = {
        f"decoder.layers.{layer}.{weight.key}": weight.size for layer in range(shape.layers) for weight in table.layer
    }
    return layers | {
        weight.key: weight.size
        for weight in (*table.first, *table.last, *shape.head_weights("untied"), *shape.head_weights("scalar"))
    }


def mine(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a whole tensor, in the parameter's shape; rows that pad the vocabulary
    are 0."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, count = parameter.partition_dim, parameter.size(parameter.partition_dim)
    first = min(parallel_state.get_tensor_model_parallel_rank() * count, whole.size(dim))
    found = whole.narrow(dim, first, min(count, whole.size(dim) - first))
    if found.size(dim) == count:
        return found
    padded = torch.zeros(parameter.shape, dtype=whole.dtype, device=whole.device)
    padded.narrow(dim, 0, found.size(dim)).copy_(found)
    return padded


@torch.no_grad()
def fill(model, shape: Shape) -> None:
    """The same weights at every layout: each whole tensor is drawn with its name's seed, and a rank
    takes its part."""
    sizes, where = whole_sizes(shape), groups.device()
    for name, parameter in named_weights(model).items():
        key = EMBEDDING if name == OUTPUT and shape.tied else name
        generator = torch.Generator(device=where).manual_seed(zlib.crc32(key.encode()))
        whole = torch.randn(sizes[key], generator=generator, device=where) * 0.02
        if key.endswith("layernorm.weight"):
            whole += 1
        parameter.copy_(mine(whole, parameter))
    if CUDA:
        torch.cuda.empty_cache()


def rows(size: str, count: int, all_tokens: bool = False, longest: int = 0) -> Batch:
    """``count`` packed rows of documents about as long as Anthropic HH's (log-normal, 220 tokens in
    the mean), loss on the last 40% of each document or on all tokens that another one of their
    document stands before."""
    generator, longest = torch.Generator().manual_seed(3), longest or length(size)
    tokens = torch.randint(0, SHAPES[size].vocab, (count, longest), generator=generator)
    documents, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row in range(count):
        start = number = 0
        while start < longest:
            many = int(
                torch.randn((), generator=generator).mul(0.7).add(5.15 if longest > 512 else 3).exp().clamp(8, longest)
            )
            documents[row, start : start + many] = number
            mask[row, start + (1 if all_tokens else max(int(0.6 * many), 1)) : start + many] = True
            start, number = start + many, number + 1
    return {"tokens": tokens, "response_mask": mask, "documents": documents}


def micro_batches(batch: Batch, config: SFTConfig) -> list[Batch]:
    """This data-parallel rank's."""
    each = batch["tokens"].size(0) // groups.data_ranks()
    first = groups.data_rank() * each
    return [
        {name: values[start : start + config.micro_batch_size] for name, values in batch.items()}
        for start in range(first, first + each, config.micro_batch_size)
    ]
