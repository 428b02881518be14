"""The passes over logits of training.models.chunked_logprobs as Triton kernels, one each; imported
on a GPU only.

They are bound by memory: forward reads the fp32 logits once, backward reads them once and writes
their gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["inverse"])
def _statistics(
    logits_ptr,
    target_ptr,
    highest_ptr,
    total_ptr,
    weighted_ptr,
    chosen_ptr,
    inverse,
    columns: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: a running maximum, and sums relative to it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    highest, total, weighted = -1e38, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, column < columns, float("-inf")).to(tl.float32) * inverse
        larger = tl.maximum(highest, tl.max(z, 0))
        before, exponentials = tl.exp(highest - larger), tl.exp(z - larger)
        if ENTROPY:
            weighted = (weighted + total * (highest - larger)) * before
            weighted += tl.sum(tl.where(column < columns, exponentials * (z - larger), 0.0), 0)
        total = total * before + tl.sum(exponentials, 0)
        highest = larger
    target = tl.load(target_ptr + row)
    here = (target >= 0) & (target < columns)
    tl.store(chosen_ptr + row, tl.load(logits_ptr + target, here, 0.0).to(tl.float32) * inverse)
    tl.store(highest_ptr + row, highest)
    tl.store(total_ptr + row, total)
    tl.store(weighted_ptr + row, weighted)


@triton.jit(do_not_specialize=["inverse"])
def _to_gradient(
    logits_ptr,
    into_ptr,
    target_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    columns,
    inverse,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = row * columns + column
    log_p = tl.load(logits_ptr + place, column < columns, 0.0).to(tl.float32) * inverse - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    gradient = tl.load(grad_logprob_ptr + row) * (tl.where(column == tl.load(target_ptr + row), 1.0, 0.0) - p)
    if ENTROPY:
        gradient -= tl.load(grad_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
    tl.store(into_ptr + place, (gradient * inverse).to(into_ptr.dtype.element_ty), column < columns)


def statistics(logits: torch.Tensor, target: torch.Tensor, temperature: float, entropy: bool):
    made = [torch.empty(logits.size(0), device=logits.device) for _ in range(4)]
    _statistics[(logits.size(0),)](logits, target, *made, 1 / temperature, logits.size(1), entropy, 8192, num_warps=8)
    return tuple(made)


def to_gradient(
    logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, into: torch.Tensor
) -> None:
    wanted, block = grad_entropy is not None, 4096
    _to_gradient[(logits.size(0), triton.cdiv(logits.size(1), block))](
        logits,
        into,
        target,
        lse,
        entropy if wanted else lse,
        grad_logprob,
        grad_entropy if wanted else lse,
        logits.size(1),
        1 / temperature,
        wanted,
        block,
        num_warps=8,
    )
