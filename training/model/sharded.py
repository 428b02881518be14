"""Matrix products of tensor parallelism with their messages: single operations, so that a compiled layer can hold them.

A column-parallel matrix (qkv, fc1) gives each rank its columns of the result from all of the input; a row-parallel one (proj, fc2) a part
of a sum over ranks (Shoeybi et al. 2019). Under sequence parallelism (Korthikanti et al. 2022), ``scattered``, a rank has T / t of the
tokens outside: they are gathered before a column-parallel product, and the sum of a row-parallel one is scattered.

megatron-core's own run the same messages beside the product of the weight's gradient, too, but add that gradient to its fp32 buffer in
a pass of its own, and a compiler can't look through their asynchronous calls. ``group`` is a process group's name.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.size(-1))


def _gathered(part: torch.Tensor, group: str, later: bool = False):
    """(T / t, ...) of each rank -> (T, ...), and the message to wait for if ``later``."""
    ranks = _resolve_process_group(group)
    whole = part.new_empty((part.size(0) * ranks.size(), *part.shape[1:]))
    return whole, dist.all_gather_into_tensor(whole, part.contiguous(), group=ranks, async_op=later)


def _summed(partial: torch.Tensor, group: str, scattered: bool, later: bool = False):
    """The sum over ranks, of which each gets T / t tokens if ``scattered``; ``partial`` is overwritten or not. As ``_gathered``."""
    ranks = _resolve_process_group(group)
    if not scattered:
        return partial, dist.all_reduce(partial, group=ranks, async_op=later)
    mine = partial.new_empty((partial.size(0) // ranks.size(), *partial.shape[1:]))
    return mine, dist.reduce_scatter_tensor(mine, partial, group=ranks, async_op=later)


def _weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, learns: bool) -> torch.Tensor:
    """Where nobody asks: nothing."""
    return torch.ops.convoy.weight_gradient(_flat(grad).contiguous(), _flat(inputs), weight) if learns else weight.new_empty(0)


@torch.library.custom_op("convoy::column", mutates_args=())
def column(inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool) -> torch.Tensor:
    return (_gathered(inputs, group)[0] if scattered else inputs) @ weight.t()


@column.register_fake
def _(inputs, weight, group, scattered):
    times = _resolve_process_group(group).size() if scattered else 1
    return inputs.new_empty((inputs.size(0) * times, *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::column_backward", mutates_args=())
def column_backward(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool,
                    learns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of inputs and weight; the messages run beside the products that do not need them."""
    whole, gathering = _gathered(inputs, group, later=True) if scattered and learns else (inputs, None)
    partial = grad @ weight
    of_inputs, summing = _summed(partial, group, scattered, later=True)
    if gathering:
        gathering.wait()
    of_weight = _weight_gradient(grad, whole, weight, learns)
    summing.wait()
    return of_inputs, of_weight


@column_backward.register_fake
def _(grad, inputs, weight, group, scattered, learns):
    return torch.empty_like(inputs), torch.empty_like(weight) if learns else weight.new_empty(0)


@torch.library.custom_op("convoy::row", mutates_args=())
def row(inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool) -> torch.Tensor:
    return _summed(inputs @ weight.t(), group, scattered)[0]


@row.register_fake
def _(inputs, weight, group, scattered):
    parts = _resolve_process_group(group).size() if scattered else 1
    return inputs.new_empty((inputs.size(0) // parts, *inputs.shape[1:-1], weight.size(0)))


@torch.library.custom_op("convoy::row_backward", mutates_args=())
def row_backward(grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool,
                 learns: bool) -> tuple[torch.Tensor, torch.Tensor]:
    whole = _gathered(grad, group)[0] if scattered else grad
    return whole @ weight, _weight_gradient(whole, inputs, weight, learns)


@row_backward.register_fake
def _(grad, inputs, weight, group, scattered, learns):
    return torch.empty_like(inputs), torch.empty_like(weight) if learns else weight.new_empty(0)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, group, scattered):
        ctx.save_for_backward(inputs, weight)
        ctx.group, ctx.scattered = group, scattered
        return torch.ops.convoy.column(inputs, weight, group, scattered)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        of_inputs, of_weight = torch.ops.convoy.column_backward(grad, inputs, weight, ctx.group, ctx.scattered, learns)
        return of_inputs, of_weight if learns else None, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, group, scattered):
        ctx.save_for_backward(inputs, weight)
        ctx.group, ctx.scattered = group, scattered
        return torch.ops.convoy.row(inputs, weight, group, scattered)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]
        of_inputs, of_weight = torch.ops.convoy.row_backward(grad, inputs, weight, ctx.group, ctx.scattered, learns)
        return of_inputs, of_weight if learns else None, None, None


def column_product(inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool) -> torch.Tensor:
    """(T, B, H), or (T / t, B, H) if ``scattered``, times this rank's rows of a column-parallel ``weight`` (V / t, H): (T, B, V / t)."""
    return _Column.apply(inputs, weight, group, scattered)


def row_product(inputs: torch.Tensor, weight: torch.Tensor, group: str, scattered: bool) -> torch.Tensor:
    """(T, B, F / t) times this rank's columns of a row-parallel ``weight`` (H, F / t), summed: (T, B, H), or (T / t, B, H)."""
    return _Row.apply(inputs, weight, group, scattered)
