"""Norms, and fused kernels of NVIDIA's Apex and Transformer Engine: used where they are asked for
by key (``fused``)."""

from __future__ import annotations

import functools
import importlib

import torch

from training.errors import ConfigError


def no_init(weight: torch.Tensor) -> None:
    """Weights always come from a checkpoint. (``perform_initialization=False`` would also drop the
    tensor-parallel attributes of the parameters, and gradient norms would silently be wrong.)"""


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm, with the flag that sequence parallelism needs (megatron-core's wrapper
    refuses it)."""

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


FUSED = {"torch": "torch", "te": "Transformer Engine", "apex": "Apex"}
"""Where norms and AdamW come from, as TrainerConfig.fused says it, and in words."""


@functools.cache
def check(fused: str) -> None:
    """Raise ConfigError where the kernels asked for are not here, whole.

    The ``apex`` of PyPI is a web project: NVIDIA's has ``apex.optimizers``, and compiled with
    --cpp_ext --cuda_ext also ``amp_C``.
    """
    if fused == "torch":
        return
    problem = ""
    if not torch.cuda.is_available():
        problem = "needs a GPU"
    elif fused == "te" and not _imports("transformer_engine.pytorch.optimizers"):
        problem = (
            "needs Transformer Engine, which is not installed here "
            "(pip install transformer-engine[pytorch] --no-build-isolation)"
        )
    elif fused == "apex" and not _imports("apex.optimizers"):
        problem = (
            "needs NVIDIA's Apex, which is not installed here "
            "(https://github.com/NVIDIA/apex; PyPI's apex is another project)"
        )
    elif fused == "apex" and not (_imports("amp_C") and _imports("fused_layer_norm_cuda")):
        problem = (
            "needs Apex with its CUDA extensions, which this one lacks: install it again with --cpp_ext --cuda_ext"
        )
    if problem:
        raise ConfigError(f'fused = "{fused}" {problem}; or set fused = "torch"')


def adam(fused: str) -> type:
    """The class of "te"'s or "apex"'s AdamW."""
    package = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}[fused]
    return importlib.import_module(package).FusedAdam


class RMSNorm(torch.nn.RMSNorm):
    """torch's root-mean-square norm, in the same way."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


@functools.cache
def norm_class(kind: str = "LayerNorm", fused: str = "torch") -> type:
    """The norm of this run, "LayerNorm" or "RMSNorm", called as (config, hidden_size, eps). Apex's
    is for layer norms alone.

    torch's by default: the compiled layer fuses them with what is around them, which is what was
    measured.
    """
    check(fused)
    if fused == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if kind == "RMSNorm":
        return RMSNorm
    if fused == "apex":
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        class ApexLayerNorm(FusedLayerNorm):
            """Made on the CPU in fp32 by megatron-core, which then casts whole models; ours are
            made where they stay."""

            def __init__(self, config, hidden_size, eps=1e-5):
                super().__init__(config, hidden_size, eps)
                self.to(torch.cuda.current_device(), config.params_dtype)

        return ApexLayerNorm
    return LayerNorm


ATTENTION = {"sdpa": "SDPA", "flex": "FlexAttention", "flash": "flash-attn", "te": "Transformer Engine"}


def describe(backend: str, fused: str = "torch") -> str:
    """For the run's log: which kernels compute."""
    return f"attention: {ATTENTION[backend]}, norms and AdamW: {FUSED[fused]}"
