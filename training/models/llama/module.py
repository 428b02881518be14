"""Llama's own modules (Touvron et al. 2023): RMSNorm, no biases, SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from training.models import lora
from training.models.norms import no_init

SETTINGS = {"normalization": "RMSNorm", "add_bias_linear": False, "activation_func": F.silu, "gated_linear_unit": True}


def swiglu(widened: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up (..., F) of ``widened`` (..., 2 F), in which gate and up alternate
    (training/models/llama/table.py)."""
    gate, up = widened.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


class FeedForward(MegatronModule):
    """down(silu(gate(x)) * up(x)). Under selective recompute only the output of ``linear_gate_up``
    is stored.

    It is not megatron-core's gated MLP, because there each tensor-parallel rank's rows of
    linear_fc1 lie in two places of the full tensor.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        column, row = lora.linears(config.lora)
        options = {
            "config": config,
            "init_method": no_init,
            "bias": False,
            "skip_bias_add": True,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
        }
        self.linear_gate_up = column(config.hidden_size, 2 * config.ffn_hidden_size, gather_output=False, **options)
        self.linear_fc2 = row(config.ffn_hidden_size, config.hidden_size, input_is_parallel=True, **options)

    def forward(self, hidden_states, per_token_scale=None, **_):
        widened, _ = self.linear_gate_up(hidden_states)
        if not self.training or self.config.recompute_granularity != "selective":
            return self.linear_fc2(swiglu(widened))
        if torch.compiler.is_compiling():  # as in training/models/bloom/module.py
            return self.linear_fc2(checkpoint(swiglu, widened, use_reentrant=False))
        recompute = CheckpointWithoutOutput(fp8=None)  # False would import Transformer Engine
        output, _ = self.linear_fc2(recompute.checkpoint(swiglu, widened))
        recompute.discard_output_and_register_recompute(output)
        return output, None
