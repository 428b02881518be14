"""Low-rank adapters (Hu et al. 2021) on megatron-core's linear layers: y = W x + (alpha / r) B A x,
with W frozen.

A tensor-parallel rank of a column-parallel layer (qkv, fc1) has all of A and its rows of B. In a
row-parallel layer (proj, fc2) it has its columns of A and all of B. So adapters add one message of
r numbers per token to a layer, and a merged rank is ``W + (alpha / r) B A`` of its own slices.
Under sequence parallelism each rank sees a part of the tokens, so the gradients of an undivided A
or B are summed over tensor-parallel ranks.

A checkpoint has W, A, B and the scale. The next stage and the export load the merged W.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    copy_tensor_model_parallel_attributes,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from training.errors import ConfigError
from training.models.linear import ColumnParallel, RowParallel

ADAPTER_PREFIX = ".lora_"
"""Part of the names of all parameters that adapters add to a model."""


@dataclass(frozen=True)
class Lora:
    """The configuration's settings of adapters."""

    rank: int
    alpha: float
    seed: int

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Adapted:
    """Base of both kinds of adapted layer; ``config.lora`` has the settings."""

    axes: dict[str, int]
    """The axis along which tensor parallelism splits each tensor."""

    def _adapt(self, inputs: int, outputs: int) -> None:
        """Create this rank's parameters A (r, inputs) and B (outputs, r)."""
        lora, like = self.config.lora, self.weight
        self.scale, self.adapting = lora.scale, True
        self.lora_a = torch.nn.Parameter(torch.empty(lora.rank, inputs, dtype=like.dtype, device=like.device))
        self.lora_b = torch.nn.Parameter(torch.empty(outputs, lora.rank, dtype=like.dtype, device=like.device))
        self.register_buffer("lora_scale", torch.tensor([self.scale], device=like.device))
        for name, parameter in (("lora_a", self.lora_a), ("lora_b", self.lora_b)):
            if name in self.axes:
                set_tensor_model_parallel_attributes(parameter, True, self.axes[name], 1)
            else:
                # megatron-core then sums its gradient over ranks.
                parameter.sequence_parallel = self.config.sequence_parallel

    def low(self, low: torch.Tensor) -> torch.Tensor:
        """Turn this rank's part of A x into the input of its B."""
        raise NotImplementedError

    def forward(self, input_, *args, **kwargs):
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.adapting:
            return output, bias
        return output + self.scale * F.linear(self.low(F.linear(input_, self.lora_a)), self.lora_b), bias

    def merged(self) -> torch.Tensor:
        """Return this rank's slice of W + (alpha / r) B A, computed in fp32, with W's attributes of
        tensor parallelism."""
        weight = merge(self.weight, self.lora_a, self.lora_b, self.scale)
        copy_tensor_model_parallel_attributes(weight, self.weight)
        return weight

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class AdaptedColumn(Adapted, ColumnParallel):
    axes = {"weight": 0, "bias": 0, "lora_b": 0}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._adapt(self.input_size, self.output_size_per_partition)

    def low(self, low):
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(low, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low, group=self.tp_group)


class AdaptedRow(Adapted, RowParallel):
    axes = {"weight": 1, "lora_a": 1}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._adapt(self.input_size_per_partition, self.output_size)

    def low(self, low):
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(low, group=self.tp_group)


def linears(lora: Lora | None) -> tuple[type, type]:
    """Return the classes of column- and row-parallel layers."""
    return (AdaptedColumn, AdaptedRow) if lora else (ColumnParallel, RowParallel)


def freeze(model: torch.nn.Module) -> None:
    """Let only adapters and a scalar head learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER_PREFIX in f".{name}" or name.startswith("score."))


def adapted(model: torch.nn.Module) -> list[tuple[str, int, Adapted]]:
    """Return (name within its layer, the layer's number in the full model from 0, module) of each
    adapted linear layer of this rank."""
    return [(name, number, module) for name, number, module in _linears(model) if isinstance(module, Adapted)]


@torch.no_grad()
def initialise(model: torch.nn.Module) -> None:
    """Set A to uniform numbers in +-1 / sqrt(inputs), as peft does, and B to zero, so that adapters
    change nothing at first. The numbers are the same on every layout."""
    for name, number, module in adapted(model):
        lora = module.config.lora
        generator = torch.Generator().manual_seed(lora.seed * 1_000_003 + 97 * number + NAMES.index(name))
        uniform = 2 * torch.rand(lora.rank, module.input_size, generator=generator) - 1
        module.lora_a.copy_(_rank_slice(module, "lora_a", uniform / math.sqrt(module.input_size)))
        module.lora_b.zero_()


NAMES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.linear_gate_up",
)
"""Names of adapted layers, of all families."""


@contextlib.contextmanager
def without(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Switch the adapters off inside the block: the model is a reference that needs no second
    copy."""
    modules = [module for _, _, module in adapted(model)]
    for module in modules:
        module.adapting = False
    try:
        yield model
    finally:
        for module in modules:
            module.adapting = True


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return W + scale B A, computed in fp32, in W's type."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


@torch.no_grad()
def absorb(reader: dcp.FileSystemReader, model: torch.nn.Module) -> None:
    """Add the adapters of ``reader``'s checkpoint, if it has any, to this rank's weights. Load
    these from the same checkpoint before.

    Every rank reads all adapters, because they are small. Verify the folder's checksums before.
    """
    adapters = {
        key: torch.empty(described.size, dtype=described.properties.dtype)
        for key, described in reader.read_metadata().state_dict_metadata.items()
        if ADAPTER_PREFIX in key and not key.startswith("optimizer.")
    }
    if not adapters:
        return
    dcp.load(adapters, storage_reader=reader, no_dist=True)
    for name, number, module in _linears(model):
        a, b, scale = (
            adapters[f"decoder.layers.{name}.lora_{part}"][number].to(module.weight.device)
            for part in ("a", "b", "scale")
        )
        a, b = _rank_slice(module, "lora_a", a), _rank_slice(module, "lora_b", b)
        module.weight.copy_(merge(module.weight, a, b, scale.item()))


def check_scale(model: torch.nn.Module) -> None:
    """Raise ConfigError if the checkpoint that was loaded for a resume has adapters of another
    scale."""
    for _, _, module in adapted(model):
        if abs(module.lora_scale.item() - module.scale) > 1e-6 * module.scale:
            raise ConfigError(
                f"lora_alpha / lora_rank = {module.scale:g}, but the checkpoint was made with "
                f"{module.lora_scale.item():g}; resume with the same values, or start the stage again"
            )


def _linears(model: torch.nn.Module) -> Iterator[tuple[str, int, torch.nn.Module]]:
    for block in (
        part for part in model.modules() if hasattr(part, "layer_number") and hasattr(part, "pre_mlp_layernorm")
    ):
        for name, module in block.named_modules():
            if name in NAMES:
                yield name, block.layer_number - 1, module


def _rank_slice(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return this tensor-parallel rank's slice of an A or B of the full layer."""
    axis = (AdaptedColumn if isinstance(module, ColumnParallelLinear) else AdaptedRow).axes.get(name)
    return tensor if axis is None else tensor.chunk(module.tp_group.size(), axis)[module.tp_group.rank()]
