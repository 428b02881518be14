"""Norms, and the fused kernels of NVIDIA's Apex and Transformer Engine, which a run uses only if
its configuration says so (``fused``)."""

from __future__ import annotations

import functools
import importlib

import torch

from training.errors import ConfigError


def no_init(weight: torch.Tensor) -> None:
    """Leave ``weight`` uninitialised: weights always come from a checkpoint.

    ``perform_initialization=False`` would also drop the parameters' attributes of tensor
    parallelism, and gradient norms would silently be wrong.
    """


class LayerNorm(torch.nn.LayerNorm):
    """torch's layer norm with the flag that sequence parallelism needs. (megatron-core's wrapper
    rejects sequence parallelism.)"""

    def __init__(self, config, hidden_size, eps=1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def _imports(package: str) -> bool:
    try:
        importlib.import_module(package)
    # The package is missing, incomplete, built for another CUDA, or written for Python 2.
    except (ImportError, OSError, RuntimeError, SyntaxError):
        return False
    return True


FUSED = {"torch": "torch", "te": "Transformer Engine", "apex": "Apex"}
"""Names of the packages of norms and AdamW, by the value of TrainerConfig.fused."""


@functools.cache
def check(fused: str) -> None:
    """Raise ConfigError if the kernels of ``fused`` are not installed completely.

    PyPI's ``apex`` is a web project. NVIDIA's has ``apex.optimizers``, and ``amp_C`` if it was
    compiled with --cpp_ext --cuda_ext.
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
    """Return the AdamW class of "te" or "apex"."""
    package = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}[fused]
    return importlib.import_module(package).FusedAdam


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the flag that sequence parallelism needs."""

    def __init__(self, config, hidden_size, eps=1e-6, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


@functools.cache
def norm_class(kind: str = "LayerNorm", fused: str = "torch") -> type:
    """Return this run's class of ``kind``, "LayerNorm" or "RMSNorm". Call it with (config,
    hidden_size, eps).

    Apex has a layer norm only; with it RMSNorm is torch's. torch's is the default and was measured:
    the compiled layer fuses it with its neighbours.
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
            """Apex's layer norm on the model's device and in its type: megatron-core creates it on
            the CPU in fp32 and casts full models later."""

            def __init__(self, config, hidden_size, eps=1e-5):
                super().__init__(config, hidden_size, eps)
                self.to(torch.cuda.current_device(), config.params_dtype)

        return ApexLayerNorm
    return LayerNorm


ATTENTION = {"sdpa": "SDPA", "flex": "FlexAttention", "flash": "flash-attn", "te": "Transformer Engine"}


def describe(backend: str, fused: str = "torch") -> str:
    """Name the kernels of a run for its log."""
    return f"attention: {ATTENTION[backend]}, norms and AdamW: {FUSED[fused]}"
