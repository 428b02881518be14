"""Matrix products of tensor parallelism together with their messages, as single operations that a
compiled layer can contain.

A column-parallel matrix (qkv, fc1) gives each rank its columns of the result from the full input. A
row-parallel one (proj, fc2) gives each rank one term of a sum over ranks (Shoeybi et al. 2019).
Under sequence parallelism (Korthikanti et al. 2022), ``scattered``, each rank has T / t of the
tokens between the products. They are gathered before a column-parallel product, and the sum of a
row-parallel one is scattered.

megatron-core's layers overlap the same messages with the weight's gradient. But they add that
gradient to its fp32 buffer in a separate pass, and a compiler can't trace their asynchronous calls.

The group is always megatron-core's of tensor parallelism. A graph contains only its size t,
``ranks``: with the group in it, each rank and layout would compile its own graph.
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


def _gather(part: torch.Tensor, ranks: int, async_op: bool = False):
    """Gather (T / t, ...) of each rank as (T, ...). Return it, and the message to wait for if
    ``async_op``."""
    gathered = part.new_empty((part.size(0) * ranks, *part.shape[1:]))
    return gathered, dist.all_gather_into_tensor(gathered, part.contiguous(), group=_group(ranks), async_op=async_op)


def _sum(partial: torch.Tensor, ranks: int, scattered: bool, async_op: bool = False):
    """Sum ``partial`` over ranks; if ``scattered``, each rank gets T / t tokens of the sum.

    Returns as ``_gather`` does. ``partial`` may be overwritten.
    """
    if not scattered:
        return partial, dist.all_reduce(partial, group=_group(ranks), async_op=async_op)
    share = partial.new_empty((partial.size(0) // ranks, *partial.shape[1:]))
    return share, dist.reduce_scatter_tensor(share, partial, group=_group(ranks), async_op=async_op)


def _weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, learns: bool) -> torch.Tensor:
    """Return the weight's gradient, or an empty tensor unless the weight ``learns``."""
    if not learns:
        return weight.new_empty(0)
    return torch.ops.convoy.weight_gradient(_flat(grad).contiguous(), _flat(inputs), weight)


@torch.library.custom_op("convoy::column", mutates_args=())
def column(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    return (_gather(inputs, ranks)[0] if scattered else inputs) @ weight.t()


@column.register_fake
def _(inputs, weight, ranks, scattered):
    return inputs.new_empty((inputs.size(0) * (ranks if scattered else 1), *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::column_backward", mutates_args=())
def column_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of inputs and weight. Messages overlap with the products that do not
    need them."""
    gathered, gathering = _gather(inputs, ranks, async_op=True) if scattered and learns else (inputs, None)
    partial = grad @ weight
    of_inputs, summing = _sum(partial, ranks, scattered, async_op=True)
    if gathering:
        gathering.wait()
    of_weight = _weight_gradient(grad, gathered, weight, learns)
    summing.wait()
    return of_inputs, of_weight


@torch.library.custom_op("convoy::row", mutates_args=())
def row(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    return _sum(inputs @ weight.t(), ranks, scattered)[0]


@row.register_fake
def _(inputs, weight, ranks, scattered):
    return inputs.new_empty((inputs.size(0) // (ranks if scattered else 1), *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::row_backward", mutates_args=())
def row_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool, learns: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    gathered = _gather(grad, ranks)[0] if scattered else grad
    return gathered @ weight, _weight_gradient(gathered, inputs, weight, learns)


def _fake_gradients(grad, inputs, weight, ranks, scattered, learns):
    return torch.empty_like(inputs), torch.empty_like(weight) if learns else weight.new_empty(0)


column_backward.register_fake(_fake_gradients)
row_backward.register_fake(_fake_gradients)


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
    """Multiply by this rank's rows of a column-parallel ``weight`` (V / t, H).

    ``inputs`` are (T, B, H), or (T / t, B, H) if ``scattered``; the result is (T, B, V / t).
    """
    return _Column.apply(inputs, weight, ranks, scattered)


def row_product(inputs: torch.Tensor, weight: torch.Tensor, ranks: int, scattered: bool) -> torch.Tensor:
    """Multiply by this rank's columns of a row-parallel ``weight`` (H, F / t) and sum over ranks.

    ``inputs`` are (T, B, F / t); the result is (T, B, H), or (T / t, B, H) if ``scattered``.
    """
    return _Row.apply(inputs, weight, ranks, scattered)
