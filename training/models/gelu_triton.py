"""The backward pass of training.models.gelu as a Triton kernel; imported on a GPU only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

STRIP = 256
"""Rows of one program; it writes one sum for each column."""


@triton.jit
def _gelu_backward(
    grad_ptr,
    inputs_ptr,
    bias_ptr,
    of_inputs_ptr,
    sums_ptr,
    rows,
    columns,
    STRIP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """With s = sigmoid(2 u) and u = sqrt(2 / pi) (x + 0.044715 x^3), gelu(x) = x s, so gelu'(x) = s
    + 2 x u' s (1 - s)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    strip = tl.program_id(1)
    bias = tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, STRIP, ROWS):
        row = strip * STRIP + start + tl.arange(0, ROWS)
        place = row[:, None].to(tl.int64) * columns + column[None]
        inside = (row < rows)[:, None] & (column < columns)[None]
        x = tl.load(inputs_ptr + place, inside, 0.0).to(tl.float32) + bias[None]
        grad = tl.load(grad_ptr + place, inside, 0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
        grad *= s + s * (1.0 - s) * x * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        tl.store(of_inputs_ptr + place, grad.to(of_inputs_ptr.dtype.element_ty), inside)
        sums += grad
    tl.store(sums_ptr + strip.to(tl.int64) * columns + column, tl.sum(sums, 0), column < columns)


def backward(grad: torch.Tensor, inputs: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = grad.shape
    of_inputs, sums = torch.empty_like(grad), torch.empty(triton.cdiv(rows, STRIP), columns, device=grad.device)
    _gelu_backward[(triton.cdiv(columns, 256), sums.size(0))](
        grad, inputs, bias, of_inputs, sums, rows, columns, STRIP, 16, 256, num_warps=4
    )
    return of_inputs, sums.sum(0).to(bias.dtype)
