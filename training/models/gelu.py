"""GELU by its tanh formula of a sum with a bias, whose backward pass reads and writes each tensor
once.

torch's compiler makes two kernels of it where there are many tokens, one for the gradient of the
inputs and one that computes it again for the bias's, a sum over tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


@torch.library.custom_op("convoy::gelu_backward", mutates_args=())
def gelu_backward(grad: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of inputs (N, C) and bias (C,) for ``grad`` (N, C) of gelu(inputs + bias); sums
    in fp32."""
    if grad.is_cuda:
        from training.models import gelu_triton

        return gelu_triton.backward(grad, inputs, bias)
    made = torch.ops.aten.gelu_backward(grad, inputs + bias, approximate="tanh")
    return made, made.sum(0)


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
    """gelu(inputs + bias), inputs (..., C), bias (C,)."""
    return _Gelu.apply(inputs, bias)
