"""Matrix products of tensor parallelism with their messages: single operations, so that a compiled
layer can hold them.

A column-parallel matrix (qkv, fc1) gives each rank its columns of the result from all of the input;
a row-parallel one (proj, fc2) a part of a sum over ranks (Shoeybi et al. 2019). Under sequence
parallelism (Korthikanti et al. 2022), ``scattered``, a rank has T / t of the tokens outside: they
are gathered before a column-parallel product, and the sum of a row-parallel one is scattered.

megatron-core's own run the same messages beside the product of the weight's gradient, too, but add
that gradient to its fp32 buffer in a pass of its own, and a compiler can't look through their
asynchronous calls.

The group is always megatron-core's of tensor parallelism, of which a graph knows the size t alone,
``ranks``: named in it, each rank and layout would compile a graph of its own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training.errors import InvariantError


def _group(ranks: int) -> dist.ProcessGroup:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() != ranks:
        raise InvariantError(f"a graph for {ranks} tensor-parallel ranks on {group.size()}")
    return group


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.size(-1))


def _gathered(part: torch.Tensor, ranks: int, later: bool = False):
    """(T / t, ...) of each rank -> (T, ...), and the message to wait for if ``later``."""
    whole = part.new_empty((part.size(0) * ranks, *part.shape[1:]))
    return whole, dist.all_gather_into_tensor(whole, part.contiguous(), group=_group(ranks), async_op=later)


def _summed(partial: torch.Tensor, ranks: int, scattered: bool, later: bool = False):
    """The sum over ranks, of which each gets T / t tokens if ``scattered``; ``partial`` is
    overwritten or not. As ``_gathered``."""
    if not scattered:
        return partial, dist.all_reduce(partial, group=_group(ranks), async_op=later)
    mine = partial.new_empty((partial.size(0) // ranks, *partial.shape[1:]))
    return mine, dist.reduce_scatter_tensor(mine, partial, group=_group(ranks), async_op=later)


def _weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, learns: bool) -> torch.Tensor:
    """Where nobody asks: nothing."""
    return (
        torch.ops.convoy.weight_gradient(_flat(grad).contiguous(), _flat(inputs), weight)
        if learns
        else weight.new_empty(0)
    )


@torch.library.custom_op("convoy::column", mutates_args=())
def column(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    return (_gathered(inputs, ranks)[0] if scattered else inputs) @ weight.t()


@column.register_fake
def _(inputs, weight, ranks, scattered):
    return inputs.new_empty((inputs.size(0) * (ranks if scattered else 1), *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::column_backward", mutates_args=())
def column_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of inputs and weight; the messages run beside the products that do not need
    them."""
    whole, gathering = _gathered(inputs, ranks, later=True) if scattered and learns else (inputs, None)
    partial = grad @ weight
    of_inputs, summing = _summed(partial, ranks, scattered, later=True)
    if gathering:
        gathering.wait()
    of_weight = _weight_gradient(grad, whole, weight, learns)
    summing.wait()
    return of_inputs, of_weight


@torch.library.custom_op("convoy::row", mutates_args=())
def row(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    return _summed(inputs @ weight.t(), ranks, scattered)[0]


@row.register_fake
def _(inputs, weight, ranks, scattered):
    return inputs.new_empty((inputs.size(0) // (ranks if scattered else 1), *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::row_backward", mutates_args=())
def row_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = _gathered(grad, ranks)[0] if scattered else grad
    return whole @ weight, _weight_gradient(whole, inputs, weight, learns)


def _gradients(grad, inputs, weight, ranks, scattered, learns):
    return torch.empty_like(inputs), torch.empty_like(weight) if learns else weight.new_empty(0)


column_backward.register_fake(_gradients)
row_backward.register_fake(_gradients)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, ranks, scattered):
        ctx.save_for_backward(inputs, weight)
        ctx.ranks, ctx.scattered = ranks, scattered
        return torch.ops.convoy.column(inputs, weight, ranks, scattered)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        of_inputs, of_weight = torch.ops.convoy.column_backward(grad, inputs, weight, ctx.ranks, ctx.scattered, learns)
        return of_inputs, of_weight if learns else None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, ranks, scattered):
        ctx.save_for_backward(inputs, weight)
        ctx.ranks, ctx.scattered = ranks, scattered
        return torch.ops.convoy.row(inputs, weight, ranks, scattered)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        of_inputs, of_weight = torch.ops.convoy.row_backward(grad, inputs, weight, ctx.ranks, ctx.scattered, learns)
        return of_inputs, of_weight if learns else None, None, None


def column_product(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    """(T, B, H), or (T / t, B, H) if ``scattered``, times this rank's rows of a column-parallel
    ``weight`` (V / t, H): (T, B, V / t)."""
    return _Column.apply(inputs, weight, ranks, scattered)


def row_product(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    """(T, B, F / t) times this rank's columns of a row-parallel ``weight`` (H, F / t), summed: (T,
    B, H), or (T / t, B, H)."""
    return _Row.apply(inputs, weight, ranks, scattered)
