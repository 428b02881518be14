"""The step of training.optim.adamw as a Triton kernel; imported on a GPU only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rate", "keep", "root", "seed", "first"])
def update(
    weight_ptr,
    remainder_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_ptr,
    factor_ptr,
    count,
    rate,
    beta1,
    beta2,
    new1,
    new2,
    eps,
    keep,
    root,
    seed,
    first,
    BLOCK: tl.constexpr,
):
    """training.optim.adamw.update_ for BLOCK elements; weight and second moment are passed as
    int16, ``seed`` and ``first`` as int32."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    gradient = tl.load(grad_ptr + offset, inside, 0.0).to(tl.float32) * tl.load(factor_ptr)
    exp_avg = tl.load(exp_avg_ptr + offset, inside, 0.0).to(tl.float32) * beta1 + gradient * new1
    exp_avg_sq = (tl.load(exp_avg_sq_ptr + offset, inside, 0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    exp_avg_sq = exp_avg_sq * beta2 + gradient * gradient * new2

    bits = (tl.load(weight_ptr + offset, inside, 0).to(tl.int32) << 16) + tl.load(remainder_ptr + offset, inside, 0).to(
        tl.int32
    )
    weight = bits.to(tl.float32, bitcast=True) * keep - rate * exp_avg / (tl.sqrt(exp_avg_sq) * root + eps)
    bits = weight.to(tl.int32, bitcast=True)
    low = bits << 16 >> 16
    tl.store(weight_ptr + offset, ((bits - low) >> 16).to(tl.int16), inside)
    tl.store(remainder_ptr + offset, low.to(tl.int16), inside)
    tl.store(exp_avg_ptr + offset, exp_avg.to(tl.bfloat16), inside)

    noise = offset.to(tl.uint32) + first.to(tl.uint32)
    noise = noise ^ seed.to(tl.uint32)
    noise = ((noise ^ (noise >> 16)) * 0x7FEB352D).to(tl.uint32)
    noise = ((noise ^ (noise >> 15)) * 0x846CA68B).to(tl.uint32)
    noise = (noise ^ (noise >> 16)) & 0xFFFF
    rounded = (exp_avg_sq.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16
    tl.store(exp_avg_sq_ptr + offset, rounded.to(tl.int16), inside)
