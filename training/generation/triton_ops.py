"""The engine's operations as Triton kernels, the same functions as torch_ops.py. CUDA; tests run
them in Triton's interpreter.

Decode attention is flash-decoding (Dao et al. 2023): where rows are few, a row's context is split
over several programs whose partial softmaxes a second kernel joins. It is bound by memory: keys and
values are read once, a page's head at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from training.errors import InvariantError
from training.generation.triton_sampling import choose, pick, summarise
from training.models.kv_cache import Batch

__all__ = ["attend", "choose", "pick", "residual_norm", "summarise", "write"]

LOG2E = 1.4426950408889634
DECODE = dict(BLOCK_N=64, num_warps=4, STAGES=3)
"""Keys a turn, warps and turns in flight of the decode kernel: measured on an H200
(docs/evidence/performance.md)."""
PREFILL = dict(BLOCK_M=64, BLOCK_N=64, num_warps=4, num_stages=2)
PROGRAMS = 1024
"""Decode programs that fill a GPU; with fewer, contexts are split."""


@triton.jit
def _residual_norm(
    hidden,
    delta,
    bias,
    weight,
    norm_bias,
    out,
    width,
    eps,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(hidden + row + at, inside, 0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta + row + at, inside, 0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + at, inside, 0.0).to(tl.float32)
        tl.store(hidden + row + at, x, inside)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
    normed = x * scale * tl.load(weight + at, inside, 0.0).to(tl.float32)
    if CENTRED:
        normed += tl.load(norm_bias + at, inside, 0.0).to(tl.float32)
    tl.store(out + row + at, normed.to(out.dtype.element_ty), inside)


def residual_norm(hidden, delta, bias, weight, norm_bias, eps: float) -> torch.Tensor:
    """``hidden`` (T, H) fp32 += ``delta`` + ``bias`` in place; its norm (without ``norm_bias``:
    RMS) in the weight's type, made in fp32."""
    rows, width = hidden.shape
    out = torch.empty(rows, width, dtype=weight.dtype, device=hidden.device)
    block = triton.next_power_of_2(width)
    _residual_norm[(rows,)](
        hidden,
        delta,
        bias,
        weight,
        norm_bias,
        out,
        width,
        eps,
        delta is not None,
        bias is not None,
        norm_bias is not None,
        block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@triton.jit
def _write(
    cache,
    key,
    value,
    pages,
    offsets,
    key_token,
    key_head,
    value_token,
    value_head,
    page_stride,
    value_offset,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    target = tl.load(pages + token) * page_stride + (head * PAGE + tl.load(offsets + token)) * DIM + dim
    tl.store(cache + target, tl.load(key + token * key_token + head * key_head + dim, inside), inside)
    tl.store(
        cache + value_offset + target, tl.load(value + token * value_token + head * value_head + dim, inside), inside
    )


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Keys and values (T, heads, D) into a layer's ``cache`` (2, pages, heads, page, D)."""
    tokens, heads, dim = key.shape
    if not key.stride(2) == value.stride(2) == 1:
        raise InvariantError(f"keys and values have strides {key.stride(2)} and {value.stride(2)} along D, expected 1")
    block_h = min(triton.next_power_of_2(heads), 8)
    _write[(tokens, triton.cdiv(heads, block_h))](
        cache,
        key,
        value,
        batch.pages,
        batch.offsets,
        *key.stride()[:2],
        *value.stride()[:2],
        cache.stride(1),
        cache.stride(0),
        dim,
        cache.size(3),
        heads,
        block_h,
        triton.next_power_of_2(dim),
        num_warps=4,
    )


@triton.jit
def _decode(
    query,
    cache,
    table,
    lengths,
    slopes,
    out,
    partial,
    scale,
    token_stride,
    head_stride,
    group_stride,
    page_stride,
    value_offset,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIBI: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row, one key-value head, one part of the context. Scores are in base 2.

    The product's 16 lines are the heads of a group. With one head a group 15 are empty, and still
    as fast as sums without tensor cores: reading keys and values takes the time.
    """
    head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    turns = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS)
    first, last = split * turns * BLOCK_N, tl.minimum((split + 1) * turns * BLOCK_N, length)
    member, dim, key = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    inside = (member[:, None] < GROUP) & (dim[None, :] < DIM)
    q = tl.load(
        query + row * token_stride + head * head_stride + member[:, None] * group_stride + dim[None, :], inside, 0.0
    )
    slope = tl.zeros((BLOCK_G,), tl.float32)
    if ALIBI:
        slope += tl.load(slopes + head * GROUP + member, member < GROUP, 0.0)
    highest = tl.full((BLOCK_G,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    sums = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        position = start + key
        seen = position < last
        page = tl.load(table + row * table_stride + position // PAGE, seen, 0).to(tl.int64)
        at = (page * page_stride + (head * PAGE + position % PAGE) * DIM)[:, None] + dim[None, :]
        mask = seen[:, None] & (dim[None, :] < DIM)
        k = tl.load(cache + at, mask, 0.0)
        v = tl.load(cache + value_offset + at, mask, 0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32")
        scores = scores * scale + (slope[:, None] * 1.4426950408889634) * (position - (length - 1))[None, :]
        scores = tl.where(seen[None, :], scores, -1e30)
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        weights = tl.where(seen[None, :], weights, 0.0)
        shrink = tl.exp2(highest - above)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee" if IEEE else "tf32")
        highest = above
    heads = KV_HEADS * GROUP
    place = row * heads + head * GROUP + member
    if SPLITS == 1:
        tl.store(out + place[:, None] * DIM + dim[None, :], (sums / total[:, None]).to(out.dtype.element_ty), inside)
    else:  # (row, head, split, D + 2): unnormalised sums, then the highest score and the total
        at = (place * SPLITS + split) * (DIM + 2)
        tl.store(partial + at[:, None] + dim[None, :], sums, inside)
        tl.store(partial + at + DIM, highest, member < GROUP)
        tl.store(partial + at + DIM + 1, total, member < GROUP)


@triton.jit
def _join(partial, out, DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row and head: the splits' sums, each scaled to the highest score."""
    place = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    at = (place * SPLITS + split) * (DIM + 2)
    highest, total = tl.load(partial + at + DIM), tl.load(partial + at + DIM + 1)
    weight = tl.exp2(highest - tl.max(highest, 0))
    sums = tl.load(partial + at[:, None] + dim[None, :], dim[None, :] < DIM, 0.0)
    joined = tl.sum(sums * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + place * DIM + dim, joined.to(out.dtype.element_ty), dim < DIM)


@triton.jit
def _prefill(
    query,
    cache,
    table,
    lengths,
    starts,
    blocks,
    slopes,
    out,
    scale,
    token_stride,
    head_stride,
    group_stride,
    page_stride,
    value_offset,
    table_stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ALIBI: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M new tokens of one sequence, one head, over all keys up to each token."""
    head = tl.program_id(1)
    sequence = tl.load(blocks + tl.program_id(0) * 2).to(tl.int64)
    begin = tl.load(blocks + tl.program_id(0) * 2 + 1)
    first, length = tl.load(starts + sequence), tl.load(lengths + sequence).to(tl.int32)
    new = (tl.load(starts + sequence + 1) - first).to(tl.int32)
    line, key, dim = begin + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    position = length - new + line  # of each query in its sequence
    inside = (line < new)[:, None] & (dim[None, :] < DIM)
    token = first + line
    q = tl.load(
        query
        + token[:, None] * token_stride
        + (head // GROUP) * head_stride
        + (head % GROUP) * group_stride
        + dim[None, :],
        inside,
        0.0,
    )
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * 1.4426950408889634
    highest = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = tl.minimum(length - new + begin + BLOCK_M, length)
    for start in range(0, end, BLOCK_N):
        at_key = start + key
        page = tl.load(table + sequence * table_stride + at_key // PAGE, at_key < end, 0).to(tl.int64)
        at = (page * page_stride + ((head // GROUP) * PAGE + at_key % PAGE) * DIM)[:, None] + dim[None, :]
        mask = (at_key < end)[:, None] & (dim[None, :] < DIM)
        k = tl.load(cache + at, mask, 0.0)
        v = tl.load(cache + value_offset + at, mask, 0.0)
        distance = at_key[None, :] - position[:, None]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee" if IEEE else "tf32") * scale + slope * distance
        scores = tl.where(distance <= 0, scores, -1e30)
        above = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(highest - above)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee" if IEEE else "tf32")
        highest = above
    place = token * HEADS + head
    tl.store(out + place[:, None] * DIM + dim[None, :], (sums / total[:, None]).to(out.dtype.element_ty), inside)


def attend(
    cache: torch.Tensor, query: torch.Tensor, batch: Batch, slopes: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Causal attention of ``query`` (T, kv_heads, group, D) over a layer's cache -> (T, kv_heads *
    group * D); see torch_ops.attend."""
    tokens, kv_heads, group, dim = query.shape
    if query.stride(3) != 1 or batch.table.stride(1) != 1:
        raise InvariantError(f"strides {query.stride(3)} (query) and {batch.table.stride(1)} (page table), expected 1")
    out = torch.empty(tokens, kv_heads * group * dim, dtype=query.dtype, device=query.device)
    strides = (*query.stride()[:3], cache.stride(1), cache.stride(0), batch.table.stride(0))
    block_d, page = triton.next_power_of_2(dim), cache.size(3)
    if batch.longest_query == 1:
        splits = _splits(tokens * kv_heads)
        partial = torch.empty(tokens, kv_heads * group, splits, dim + 2, device=query.device) if splits > 1 else out
        _decode[(kv_heads, tokens, splits)](
            query,
            cache,
            batch.table,
            batch.lengths,
            slopes,
            out,
            partial,
            scale * LOG2E,
            *strides,
            kv_heads,
            group,
            dim,
            page,
            splits,
            slopes is not None,
            query.dtype == torch.float32,
            BLOCK_G=max(16, triton.next_power_of_2(group)),
            BLOCK_D=block_d,
            **DECODE,
        )
        if splits > 1:
            _join[(tokens * kv_heads * group,)](partial, out, dim, splits, block_d, num_warps=2)
        return out
    blocks = _query_blocks(batch)
    _prefill[(len(blocks), kv_heads * group)](
        query,
        cache,
        batch.table,
        batch.lengths,
        batch.starts,
        blocks,
        slopes,
        out,
        scale * LOG2E,
        *strides,
        group,
        kv_heads * group,
        dim,
        page,
        slopes is not None,
        query.dtype == torch.float32,
        BLOCK_D=block_d,
        **PREFILL,
    )
    return out


def _splits(programs: int) -> int:
    """Parts of a context, so many that the GPU is full: 1, 4 or 16 (each number is a kernel to
    compile)."""
    return next((splits for splits in (1, 4) if splits * programs >= PROGRAMS), 16)


def _query_blocks(batch: Batch) -> torch.Tensor:
    """(blocks, 2) int32: sequence, and first of its new tokens, of each block of queries."""
    if "blocks" not in batch.derived:
        size = PREFILL["BLOCK_M"]
        pairs = [(sequence, first) for sequence, count in enumerate(batch.counts) for first in range(0, count, size)]
        host = torch.tensor(pairs, dtype=torch.int32)
        batch.derived["blocks"] = (
            host.pin_memory().to(batch.table.device, non_blocking=True) if batch.table.is_cuda else host
        )
    return batch.derived["blocks"]
