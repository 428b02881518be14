"""Fused kernels of NVIDIA's Apex and Transformer Engine: used where they are, and told apart from what only has the name."""

from __future__ import annotations

import functools
import importlib

import torch

from training.settings import ConfigError


def no_init(weight: torch.Tensor) -> None:
    """Weights always come from a checkpoint. (``perform_initialization=False`` would also drop the tensor-parallel
    attributes of the parameters, and gradient norms would silently be wrong.)"""


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm, with the flag that sequence parallelism needs (megatron-core's wrapper refuses it)."""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError, SyntaxError):  # not there, half there, for another CUDA, or Python 2
        return False
    return True


@functools.cache
def provider() -> str:
    """Where fused norms and Adam come from: "Transformer Engine", "Apex" or "torch" (also without a GPU).

    The ``apex`` of PyPI is a web project: NVIDIA's has ``apex.optimizers``, and compiled with --cpp_ext --cuda_ext also ``amp_C``.
    Raises ConfigError where NVIDIA's is there without its extensions: megatron-core would take it and fail at the first step.
    """
    if not torch.cuda.is_available():
        return "torch"
    if _imports("transformer_engine.pytorch.optimizers"):
        return "Transformer Engine"
    if _imports("apex.optimizers"):
        if not (_imports("amp_C") and _imports("fused_layer_norm_cuda")):
            raise ConfigError("NVIDIA's Apex is installed without its CUDA extensions, which megatron-core needs; install it again with "
                              "--cpp_ext --cuda_ext (https://github.com/NVIDIA/apex), or remove it: pip uninstall apex")
        return "Apex"
    return "torch"


class RMSNorm(torch.nn.RMSNorm):
    """torch's root-mean-square norm, in the same way."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


@functools.cache
def norm_class(kind: str = "LayerNorm") -> type:
    """The norm of this run, "LayerNorm" or "RMSNorm", called as (config, hidden_size, eps). Apex's is for layer norms alone."""
    if provider() == "Transformer Engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if kind == "RMSNorm":
        return RMSNorm
    if provider() == "Apex":
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        class ApexLayerNorm(FusedLayerNorm):
            """Made on the CPU in fp32 by megatron-core, which then casts whole models; ours are made where they stay."""

            def __init__(self, config, hidden_size, eps=1e-5):
                super().__init__(config, hidden_size, eps)
                self.to(torch.cuda.current_device(), config.params_dtype)

        return ApexLayerNorm
    return LayerNorm


ATTENTION = {"sdpa": "SDPA", "flex": "FlexAttention", "flash": "flash-attn", "te": "Transformer Engine"}


def describe(backend: str) -> str:
    """For the run's log: which kernels compute."""
    return f"attention: {ATTENTION[backend]}, norms: {provider()}, AdamW: {provider()}"
