"""GELU (tanh formula) of inputs plus bias, with a backward pass that reads and writes each tensor
once.

For many tokens torch's compiler makes two kernels: one for the inputs' gradient, and one that
computes it again for the bias's gradient, a sum over tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.library.custom_op("convoy::gelu_backward", mutates_args=())
def gelu_backward(grad: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of inputs (N, C) and bias (C,) of gelu(inputs + bias), for ``grad`` (N,
    C). Sums are fp32."""
    if grad.is_cuda:
        from training.models import gelu_triton

        return gelu_triton.backward(grad, inputs, bias)
    of_inputs = torch.ops.aten.gelu_backward(grad, inputs + bias, approximate="tanh")
    return of_inputs, of_inputs.sum(0)


@gelu_backward.register_fake
def _(grad, inputs, bias):
    return torch.empty_like(grad), torch.empty_like(bias)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, bias):
        ctx.save_for_backward(inputs, bias)
        return F.gelu(inputs + bias, approximate="tanh")

    @staticmethod
    def backward(ctx, grad):
        inputs, bias = ctx.saved_tensors
        columns = grad.size(-1)
        of_inputs, of_bias = torch.ops.convoy.gelu_backward(
            grad.reshape(-1, columns).contiguous(), inputs.reshape(-1, columns), bias
        )
        return of_inputs.view_as(inputs), of_bias


def gelu(inputs: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return gelu(inputs + bias); inputs (..., C), bias (C,)."""
    return _Gelu.apply(inputs, bias)
