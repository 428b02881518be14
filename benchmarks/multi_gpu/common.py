"""What the parts of benchmarks/multi_gpu/suite.py share: shapes, a layout's settings, and the same
weights and rows at every layout."""

from __future__ import annotations

import zlib

import torch
from megatron.core import parallel_state

from benchmarks import common, shapes
from benchmarks.device import CUDA, PRECISION
from benchmarks.inputs import packed_documents
from training.config.shape import EMBEDDING, OUTPUT, Shape
from training.config.trainers import SFTConfig
from training.distributed import groups
from training.generation.weight_sync import named_weights
from training.trainer.step import Batch

SHAPES = {**shapes.SHAPES, "tiny": shapes.TINY_ON_GPU if CUDA else shapes.SHAPES["tiny"]}


def print_row(**values: object) -> None:
    """One JSON line, by rank 0."""
    if groups.is_main():
        common.print_row(**values)


def length(size: str) -> int:
    """Tokens of a row."""
    return 128 if size == "tiny" else 2048


def settings(size: str, **values: object) -> SFTConfig:
    """``values``: the layout's keys among them."""
    defaults = {"precision": PRECISION, "seq_length": length(size), "iterations": 1000}
    return common.sft_config(**defaults | values)


def tensor_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The size of every tensor of a language or reward model, by its name on one GPU."""
    table = shape.table
    layers = {
        f"decoder.layers.{layer}.{weight.key}": weight.size for layer in range(shape.layers) for weight in table.layer
    }
    return layers | {
        weight.key: weight.size
        for weight in (*table.first, *table.last, *shape.head_weights("untied"), *shape.head_weights("scalar"))
    }


def local_part(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part of a tensor of the undivided model, in the parameter's shape; rows that pad
    the vocabulary are 0."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return tensor
    dim, count = parameter.partition_dim, parameter.size(parameter.partition_dim)
    first = min(parallel_state.get_tensor_model_parallel_rank() * count, tensor.size(dim))
    part = tensor.narrow(dim, first, min(count, tensor.size(dim) - first))
    if part.size(dim) == count:
        return part
    padded = torch.zeros(parameter.shape, dtype=tensor.dtype, device=tensor.device)
    padded.narrow(dim, 0, part.size(dim)).copy_(part)
    return padded


@torch.no_grad()
def fill(model, shape: Shape) -> None:
    """Random weights, the same at every layout: each tensor of the undivided model is drawn with a
    seed from its name, and a rank takes its part."""
    sizes, device = tensor_sizes(shape), groups.device()
    for name, parameter in named_weights(model).items():
        key = EMBEDDING if name == OUTPUT and shape.tied else name
        generator = torch.Generator(device=device).manual_seed(zlib.crc32(key.encode()))
        tensor = torch.randn(sizes[key], generator=generator, device=device) * 0.02
        if key.endswith("layernorm.weight"):
            tensor += 1
        parameter.copy_(local_part(tensor, parameter))
    if CUDA:
        torch.cuda.empty_cache()


def rows(size: str, count: int, all_tokens: bool = False, seq_length: int = 0) -> Batch:
    """``count`` packed rows of ``seq_length`` tokens, by default ``length(size)``.

    They have loss on the last 40% of each document, or on all tokens except each document's first.
    """
    generator, seq_length = torch.Generator().manual_seed(3), seq_length or length(size)
    tokens = torch.randint(0, SHAPES[size].vocab, (count, seq_length), generator=generator)
    documents, mask = packed_documents(count, seq_length, generator, all_tokens)
    return {"tokens": tokens, "response_mask": mask, "documents": documents}


def micro_batches(batch: Batch, config: SFTConfig) -> list[Batch]:
    """The micro-batches of this data-parallel rank."""
    each = batch["tokens"].size(0) // groups.data_ranks()
    first = groups.data_rank() * each
    return [
        {name: values[start : start + config.micro_batch_size] for name, values in batch.items()}
        for start in range(first, first + each, config.micro_batch_size)
    ]
