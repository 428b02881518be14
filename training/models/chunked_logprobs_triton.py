"""The two passes over logits of training.models.chunked_logprobs as Triton kernels; imported on a
GPU only.

They are bound by memory: the forward pass reads the fp32 logits once; the backward pass reads them
once and writes their gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["inverse"])
def _statistics(
    logits_ptr,
    target_ptr,
    largest_ptr,
    total_ptr,
    weighted_ptr,
    target_z_ptr,
    inverse,
    columns: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: a running maximum, and sums relative to it."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * columns
    largest, total, weighted = -1e38, 0.0, 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + column, column < columns, float("-inf")).to(tl.float32) * inverse
        larger = tl.maximum(largest, tl.max(z, 0))
        before, exponentials = tl.exp(largest - larger), tl.exp(z - larger)
        if ENTROPY:
            weighted = (weighted + total * (largest - larger)) * before
            weighted += tl.sum(tl.where(column < columns, exponentials * (z - larger), 0.0), 0)
        total = total * before + tl.sum(exponentials, 0)
        largest = larger
    target = tl.load(target_ptr + row)
    is_local = (target >= 0) & (target < columns)
    tl.store(target_z_ptr + row, tl.load(logits_ptr + target, is_local, 0.0).to(tl.float32) * inverse)
    tl.store(largest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    tl.store(weighted_ptr + row, weighted)


@triton.jit(do_not_specialize=["inverse"])
def _to_gradient(
    logits_ptr,
    output_ptr,
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
    offset = row * columns + column
    log_p = tl.load(logits_ptr + offset, column < columns, 0.0).to(tl.float32) * inverse - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    gradient = tl.load(grad_logprob_ptr + row) * (tl.where(column == tl.load(target_ptr + row), 1.0, 0.0) - p)
    if ENTROPY:
        gradient -= tl.load(grad_entropy_ptr + row) * p * (log_p + tl.load(entropy_ptr + row))
    tl.store(output_ptr + offset, (gradient * inverse).to(output_ptr.dtype.element_ty), column < columns)


def statistics(logits: torch.Tensor, target: torch.Tensor, temperature: float, entropy: bool):
    outputs = [torch.empty(logits.size(0), device=logits.device) for _ in range(4)]
    grid = (logits.size(0),)
    _statistics[grid](logits, target, *outputs, 1 / temperature, logits.size(1), entropy, 8192, num_warps=8)
    return tuple(outputs)


def to_gradient(
    logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, output: torch.Tensor
) -> None:
    with_entropy, block = grad_entropy is not None, 4096
    _to_gradient[(logits.size(0), triton.cdiv(logits.size(1), block))](
        logits,
        output,
        target,
        lse,
        entropy if with_entropy else lse,
        grad_logprob,
        grad_entropy if with_entropy else lse,
        logits.size(1),
        1 / temperature,
        with_entropy,
        block,
        num_warps=8,
    )
