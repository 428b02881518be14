"""Linear layers that add their weight's gradient directly to the fp32 buffer that sums it over
micro-batches, without a bf16 tensor in between.

Otherwise each micro-batch writes a gradient, reads it again and adds it to the buffer: 30 of 650 ms
at 7b1 on an H200. Here the matrix product itself adds to the buffer (cuBLAS does not round in
between), and the embedding adds only the rows of its tokens. This is megatron-core's "gradient
accumulation fusion", for which it needs Apex. Under tensor parallelism the products are those of
training.models.tp_linear.
"""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from training.models import tp_linear

_buffers: dict[int, weakref.ref] = {}
"""Trained parameters that have a buffer, by their address: a compiled graph passes tensors, not
parameters."""


def accumulate(model: torch.nn.Module) -> None:
    """From now on add gradients of ``model``'s matrices to their ``main_grad``, which
    megatron-core's DistributedDataParallel has made."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            _buffers[parameter.data_ptr()] = weakref.ref(parameter)


def buffer(weight: torch.Tensor) -> torch.Tensor | None:
    """Return the tensor to which the gradient of ``weight`` is added; None if it has none."""
    parameter = _buffers[weight.data_ptr()]() if weight.data_ptr() in _buffers else None
    alive = parameter is not None and parameter.data_ptr() == weight.data_ptr() and parameter.shape == weight.shape
    return getattr(parameter, "main_grad", None) if alive else None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left^T right to ``total``: (V, H) += (N, V)^T (N, H). Sums and products are fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.float().t(), right.float())


@torch.library.custom_op("convoy::weight_gradient", mutates_args=())
def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient of weight (V, H) from grad (N, V) and inputs (N, H). If it was added to
    the weight's buffer, return uninitialised memory instead, which is never read.

    It is a custom op so that the compiler does not look inside: autograd and the graph need only a
    tensor of the right shape. It is declared to change nothing, so the compiler may merge two calls
    with equal arguments (torch 2.13: half the gradient). A compiled graph must therefore use a
    weight once, as a layer does (tests/training/models/test_weight_gradient.py).
    """
    total = buffer(weight)
    if total is None:
        return grad.t() @ inputs
    add_product(total, grad, inputs)
    # DistributedDataParallel then ignores the returned tensor.
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
        total = buffer(weight)
        if total is None:
            return None, torch.zeros_like(weight).index_put_((tokens,), grad, accumulate=True)
        # index_put_ sorts, so that the order of the sums never changes.
        total.index_put_((tokens,), grad.to(total.dtype), accumulate=True)
        return None, None


def embed(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the rows of ``weight`` (V, H) for ``tokens`` (B, T): (T, B, H)."""
    # The result has the strides of the index, so the index must be contiguous.
    return _Embedding.apply(tokens.t().contiguous(), weight)


class ColumnParallel(ColumnParallelLinear):
    """megatron-core's column-parallel layer with this file's weight gradient."""

    def _forward_impl(self, input, weight, bias=None, **kwargs):
        if self.tp_group.size() > 1:
            output = tp_linear.column_product(input, weight, self.tp_group.size(), self.sequence_parallel)
            return output if bias is None else output + bias
        if not weight.requires_grad:
            return super()._forward_impl(input, weight, bias=bias, **kwargs)
        return _Linear.apply(input, weight, bias)


class RowParallel(RowParallelLinear):
    """megatron-core's row-parallel layer with this file's weight gradient."""

    def _forward_impl(self, input, weight, bias=None, **kwargs):
        if not weight.requires_grad:
            # Row-parallel layers pass no group. megatron-core then looks it up and warns, and the
            # warning breaks a compiled graph.
            return super()._forward_impl(input, weight, bias=bias, **{**kwargs, "tp_group": self.tp_group})
        return _Linear.apply(input, weight, bias)

    def forward(self, input_):
        if self.tp_group.size() == 1:
            return super().forward(input_)
        output = tp_linear.row_product(input_, self.weight, self.tp_group.size(), self.sequence_parallel)
        if self.skip_bias_add:
            return output, self.bias
        return output if self.bias is None else output + self.bias, None
