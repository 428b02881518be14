"""megatron-core's transformer layer, compiled as a whole on a GPU."""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from training.models.attention import Documents
from training.models.attention_backends import expect_many_shapes


class CompiledLayer(TransformerLayer):
    """A layer that runs compiled: norms, biases, GELU and residuals become a few fused kernels. All
    layers of a model share one graph.

    It runs uncompiled in generation, which has other shapes at every step, and on the CPU.
    """

    def forward(self, *args, **kwargs):
        packed = kwargs.get("packed_seq_params")
        if isinstance(packed, Documents) and packed.compiled:
            fullgraph = self.config.core_attention == "flex" and self.config.fused == "torch"
            return _compiled(fullgraph)(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


@functools.cache
def _compiled(fullgraph: bool):
    """Compile the layer. ``fullgraph`` forbids graph breaks; kernels of other packages cause
    them."""
    expect_many_shapes()
    return torch.compile(TransformerLayer.forward, fullgraph=fullgraph)
