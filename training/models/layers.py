"""megatron-core's transformer layer, compiled as a whole on a GPU."""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from training.models.attention import Documents
from training.models.attention_backends import expect_many_shapes


class CompiledLayer(TransformerLayer):
    """One graph for all layers of a model: norms, biases, GELU and residuals run in a few fused
    kernels.

    Not compiled are generation, which has other shapes at every step, and the CPU.
    """

    def forward(self, *args, **kwargs):
        packed = kwargs.get("packed_seq_params")
        if isinstance(packed, Documents) and packed.compiled:
            whole = self.config.core_attention == "flex" and self.config.fused == "torch"
            return _compiled(whole)(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


@functools.cache
def _compiled(whole: bool):
    """``whole``: without graph breaks, which kernels of other packages are."""
    expect_many_shapes()
    return torch.compile(TransformerLayer.forward, fullgraph=whole)
