"""BLOOM's own modules (Le Scao et al. 2022): layer norms, biases everywhere, GELU by its tanh
formula."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from training.models import lora
from training.models.gelu import gelu

# The fused form of F.gelu is the tanh formula, the unfused one is not: state the formula, leave
# fusion off.
SETTINGS = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "activation_func": partial(F.gelu, approximate="tanh"),
}


class FeedForward(MLP):
    """megatron-core's MLP. Under selective recompute it drops GELU's output (8 H bytes per token in
    bf16) and computes it again.

    megatron-core's own "mlp" recompute returns the bias from a checkpointed function and recurses
    without end.
    """

    def __init__(self, config: TransformerConfig):
        column, row = lora.linears(config.lora)
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=column, linear_fc2=row),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states, per_token_scale=None, **_):
        widened, bias = self.linear_fc1(hidden_states)
        if not self.training or self.config.recompute_granularity != "selective":
            return self.linear_fc2(gelu(widened, bias))
        # The compiler then computes GELU again wherever the backward pass needs it.
        if torch.compiler.is_compiling():
            return self.linear_fc2(checkpoint(gelu, widened, bias, use_reentrant=False))
        recompute = CheckpointWithoutOutput(fp8=None)  # False would import Transformer Engine
        activated = recompute.checkpoint(gelu, widened, bias)
        output, output_bias = self.linear_fc2(activated)
        recompute.discard_output_and_register_recompute(output)
        return output, output_bias
