"""Matrices whose gradients go straight into the fp32 buffer that sums them over micro-batches,
without a bf16 tensor in between.

Else each micro-batch writes a gradient, reads it again and adds it to the buffer: 30 of 650 ms at
7b1 on an H200. Here the matrix product adds to the buffer itself (cuBLAS rounds nothing on the
way), and the embedding adds only the rows of its tokens. This is megatron-core's "gradient
accumulation fusion", for which it needs Apex. Under tensor parallelism the products are
training.models.tp_linear's.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from training.models import tp_linear

_buffers: dict[int, weakref.ref] = {}
"""Trained parameters that have a buffer, by their address: a compiled graph hands over tensors, not
parameters."""


def accumulate(model: torch.nn.Module) -> None:
    """From now on gradients of ``model``'s matrices go into their ``main_grad`` (megatron-core's
    DistributedDataParallel made it)."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            _buffers[parameter.data_ptr()] = weakref.ref(parameter)


def buffer(weight: torch.Tensor) -> torch.Tensor | None:
    """Where the gradient of ``weight`` is to be added, if there is such a place."""
    parameter = _buffers[weight.data_ptr()]() if weight.data_ptr() in _buffers else None
    alive = parameter is not None and parameter.data_ptr() == weight.data_ptr() and parameter.shape == weight.shape
    return getattr(parameter, "main_grad", None) if alive else None


def add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``into`` += left^T right, (V, H) += (N, V)^T (N, H); sums and products in fp32."""
    if left.dtype == into.dtype:
        into.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(into, left.t(), right, out_dtype=into.dtype, out=into)
    else:
        into.addmm_(left.float().t(), right.float())


@torch.library.custom_op("convoy::weight_gradient", mutates_args=())
def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """grad (N, V), inputs (N, H) -> the gradient of weight (V, H); where that was added to its
    buffer, memory that nobody reads.

    A custom op, so that the compiler does not look inside: a tensor of the right shape is all that
    autograd and the graph need. It is declared to change nothing, so the compiler takes two calls
    with equal arguments for one (torch 2.13: half the gradient). A compiled graph therefore uses a
    weight once; a layer does (tests/training/models/test_weight_gradient.py).
    """
    into = buffer(weight)
    if into is None:
        return grad.t() @ inputs
    add_product(into, grad, inputs)
    # DistributedDataParallel then drops what is returned
    _buffers[weight.data_ptr()]().grad_added_to_main_grad = True
    return torch.empty_like(weight)


@weight_gradient.register_fake
def _(grad, inputs, weight):
    return torch.empty_like(weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.save_for_backward(inputs, weight)
        return F.linear(inputs, weight, bias)  # the product adds the bias itself

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.size(-1)).contiguous()
        of_weight = torch.ops.convoy.weight_gradient(flat, inputs.reshape(-1, inputs.size(-1)), weight)
        return grad @ weight, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, weight):
        ctx.save_for_backward(tokens, weight)
        return weight[tokens]

    @staticmethod
    def backward(ctx, grad):
        tokens, weight = ctx.saved_tensors
        into = buffer(weight)
        if into is None:
            return None, torch.zeros_like(weight).index_put_((tokens,), grad, accumulate=True)
        # sorts: always the same sum
        into.index_put_((tokens,), grad.to(into.dtype), accumulate=True)
        return None, None


def embed(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows of ``weight`` (V, H): (B, T) -> (T, B, H)."""
    # rows of an index with other strides would come out with those
    return _Embedding.apply(tokens.t().contiguous(), weight)


class ColumnParallel(ColumnParallelLinear):
    """megatron-core's, with the sum of gradients described above."""

    def _forward_impl(self, input, weight, bias=None, **kwargs):
        if self.tp_group.size() > 1:
            output = tp_linear.column_product(input, weight, self.tp_group.size(), self.sequence_parallel)
            return output if bias is None else output + bias
        if not weight.requires_grad:
            return super()._forward_impl(input, weight, bias=bias, **kwargs)
        return _Linear.apply(input, weight, bias)


class RowParallel(RowParallelLinear):
    """megatron-core's, with the sum of gradients described above."""

    def _forward_impl(self, input, weight, bias=None, **kwargs):
        if not weight.requires_grad:
            # Row-parallel layers pass no group; megatron-core looks it up and warns, and a warning
            # breaks a compiled graph.
            return super()._forward_impl(input, weight, bias=bias, **{**kwargs, "tp_group": self.tp_group})
        return _Linear.apply(input, weight, bias)

    def forward(self, input_):
        if self.tp_group.size() == 1:
            return super().forward(input_)
        output = tp_linear.row_product(input_, self.weight, self.tp_group.size(), self.sequence_parallel)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias, None
