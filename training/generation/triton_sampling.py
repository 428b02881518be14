"""Sampling on the GPU without sorting the vocabulary: logits are read once, in chunks, for maximum,
sum and the most likely token.

The draw then falls into one chunk, which is read again. Top-k and top-p look for the smallest logit
that stays, by searching the bits of fp32 numbers: exact, eight or nine readings of the logits for
each, and only where a row asks for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from training.generation import sampling

CHUNK = 4096


@triton.jit
def _summarise(
    logits,
    temperature,
    floor,
    chunk_max,
    chunk_sum,
    chunk_argmax,
    vocab,
    stride,
    chunks,
    FLOOR: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row, one chunk: its largest scaled logit, the sum of exp(logit - largest) over logits >=
    ``floor``, its first largest column."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    row_temperature = tl.load(temperature + row)
    row_temperature = tl.where(row_temperature == 0, 1.0, row_temperature)
    x = tl.load(logits + row * stride + at, at < vocab, float("-inf"))
    if FLOOR:
        x = tl.where(x >= tl.load(floor + row), x, float("-inf"))
    most = tl.max(x, 0)
    column = tl.min(tl.where(x == most, at, 2147483647), 0)
    anchor = tl.where(most == float("-inf"), 0.0, most / row_temperature)
    tl.store(chunk_max + row * chunks + chunk, tl.where(most == float("-inf"), float("-inf"), anchor))
    tl.store(chunk_sum + row * chunks + chunk, tl.sum(tl.exp(x / row_temperature - anchor), 0))
    tl.store(chunk_argmax + row * chunks + chunk, column)


# "first" is not specialised: ranks differ in nothing else, and must run the same code, down to the
# order in which it sums.
@triton.jit(do_not_specialize=["first"])
def _pick(
    logits,
    temperature,
    uniforms,
    floor,
    chunk_max,
    chunk_sum,
    chunk_argmax,
    token,
    lse,
    vocab,
    stride,
    chunks,
    own,
    first,
    FLOOR: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row: the chunk that the draw falls into, the column there, and (unless None) the
    logarithm of the sum of all.

    ``logits`` are the columns of ``own`` of the ``chunks``, from number ``first`` on: -1 where the
    chunk is another's.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_C)
    row_temperature = tl.load(temperature + row)
    peaks = tl.load(chunk_max + row * chunks + part, part < chunks, float("-inf"))
    peak = tl.max(peaks, 0)
    weights = tl.load(chunk_sum + row * chunks + part, part < chunks, 0.0) * tl.exp(peaks - peak)
    everything = tl.sum(weights, 0)
    if lse is not None:
        tl.store(lse + row, peak + tl.log(everything))
    if row_temperature == 0:
        own_chunk = tl.min(tl.where(peaks == peak, part, 2147483647), 0) - first
        is_owner = (own_chunk >= 0) & (own_chunk < own)
        column = tl.load(chunk_argmax + row * own + tl.where(is_owner, own_chunk, 0))
        tl.store(token + row, tl.where(is_owner, column, -1).to(tl.int64))
    else:
        cumulative = tl.cumsum(weights, 0)
        threshold = tl.load(uniforms + row) * tl.max(cumulative, 0)
        # The last chunk with any weight is the limit: rounding must not lead behind it.
        last = tl.max(tl.where(weights > 0, part, 0), 0)
        chosen = tl.minimum(tl.sum((cumulative <= threshold).to(tl.int32), 0), last)
        before = tl.sum(tl.where(part < chosen, weights, 0.0), 0)
        own_chunk = chosen - first
        is_owner = (own_chunk >= 0) & (own_chunk < own)
        own_chunk = tl.where(is_owner, own_chunk, own)  # behind this rank's columns, where nothing is read
        at = own_chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row * stride + at, at < vocab, float("-inf"))
        if FLOOR:
            x = tl.where(x >= tl.load(floor + row), x, float("-inf"))
        inside = tl.exp(x / row_temperature - peak)
        running = before + tl.cumsum(inside, 0)
        last = tl.max(tl.where(inside > 0, at, 0), 0)
        column = tl.sum((running <= threshold).to(tl.int32), 0) + own_chunk * CHUNK
        column = tl.minimum(column, last)
        # Skip what has no probability: the first column with any from here on.
        column = tl.min(tl.where((at >= column) & (inside > 0), at, 2147483647), 0)
        tl.store(token + row, tl.where(is_owner, column, -1).to(tl.int64))


@triton.jit
def _ordered(x):
    """fp32 -> int32 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _beyond(logits, thresholds, lowest_order, peak, row_temperature, vocab, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """(16,) of a row: how many logits >= each threshold (COUNT), or the weight of those above it;
    only logits >= ``lowest_order`` take part."""
    thresholds = tl.maximum(thresholds, -2147483647).to(tl.int32)
    counts = tl.zeros((16, CHUNK), tl.float32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        x = tl.load(logits + at, at < vocab, float("-inf"))
        order = _ordered(x)
        if COUNT:
            counts += ((order[None, :] >= thresholds[:, None]) & (at < vocab)[None, :]).to(tl.float32)
        else:
            weight = tl.where(order >= lowest_order, tl.exp((x - peak) / row_temperature), 0.0)
            counts += tl.where(order[None, :] > thresholds[:, None], weight[None, :], 0.0)
    return tl.sum(counts, 1)


@triton.jit
def _floor(logits, temperature, top_k, top_p, out, vocab, stride, CHUNK: tl.constexpr):
    """One row: the smallest logit that top-k, then top-p, let stay.

    top-k: the largest t with count(x >= t) >= k. top-p: the smallest t with weight(x > t) < p of
    what top-k left. Each turn reads the logits once and tries 16 values, which leave a seventeenth
    of the interval.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    row_temperature = tl.load(temperature + row)
    row_temperature = tl.where(row_temperature == 0, 1.0, row_temperature)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    number = tl.arange(0, 16)
    peak = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocab, CHUNK):
        at = start + tl.arange(0, CHUNK)
        peak = tl.maximum(peak, tl.max(tl.load(logits + at, at < vocab, float("-inf")), 0))
    top = _ordered(peak).to(tl.int64)
    least = tl.full((), -2147483647, tl.int64)
    if (k > 0) & (k < vocab):
        high = top + 1
        while high - least > 1:  # count(x >= least) >= k > count(x >= high)
            tried = least + ((high - least) * (number + 1)) // 17
            enough = _beyond(logits, tried, least, peak, row_temperature, vocab, True, CHUNK) >= k
            next_high = tl.min(tl.where(enough, high, tried), 0)
            least = tl.max(tl.where(enough, tried, least), 0)
            high = next_high
    floor = least
    if p < 1:
        everything = tl.max(
            _beyond(logits, tl.full((16,), -2147483648, tl.int64), least, peak, row_temperature, vocab, False, CHUNK), 0
        )
        low, floor = least - 1, top
        while floor - low > 1:  # weight(x > floor) < p <= weight(x > low), or low stands before all
            tried = low + ((floor - low) * (number + 1)) // 17
            small = _beyond(logits, tried, least, peak, row_temperature, vocab, False, CHUNK) < p * everything
            next_low = tl.max(tl.where(small, low, tried), 0)
            floor = tl.min(tl.where(small, tried, floor), 0)
            low = next_low
    bits = floor.to(tl.int32)
    bits = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    tl.store(out + row, tl.where((k > 0) | (p < 1), bits.to(tl.float32, bitcast=True), float("-inf")))


def choose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (B,) int64 and their log-probabilities (B,) fp32 from ``logits`` (B, V) fp32: see
    training.generation.sampling.choose."""
    floor = None
    if top_k is not None:
        rows, vocab = logits.shape
        floor = torch.empty(rows, device=logits.device)
        _floor[(rows,)](
            logits, temperature, top_k, top_p, floor, vocab, logits.stride(0), min(CHUNK, 2048), num_warps=16
        )
        chunk_max, chunk_sum, _ = summarise(logits, temperature)
        lse_all = torch.logsumexp(chunk_max + chunk_sum.log(), -1)
    lse = torch.empty(len(logits), device=logits.device)
    tokens = pick(logits, temperature, uniforms, *summarise(logits, temperature, floor), floor=floor, lse=lse)
    scaled = logits.gather(1, tokens[:, None]).squeeze(1) / sampling.nonzero_temperature(temperature)
    return tokens, scaled - (lse if floor is None else lse_all)


def summarise(logits: torch.Tensor, temperature: torch.Tensor, floor: torch.Tensor | None = None):
    """As training.generation.sampling.summarise; chunks of CHUNK columns, the last may be short.
    ``floor`` (B,): only logits from it on."""
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, CHUNK)
    chunk_max, chunk_sum = (torch.empty(rows, chunks, device=logits.device) for _ in range(2))
    chunk_argmax = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    _summarise[(rows, chunks)](
        logits,
        temperature,
        floor,
        chunk_max,
        chunk_sum,
        chunk_argmax,
        vocab,
        logits.stride(0),
        chunks,
        floor is not None,
        CHUNK,
        num_warps=4,
    )
    return chunk_max, chunk_sum, chunk_argmax


def pick(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    chunk_max: torch.Tensor,
    chunk_sum: torch.Tensor,
    chunk_argmax: torch.Tensor,
    first: int = 0,
    floor: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """As training.generation.sampling.pick. ``lse`` (B,) is filled with the logarithm of the sum of
    all exp(scaled logits)."""
    rows, vocab = logits.shape
    chunks = chunk_max.size(1)
    column = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _pick[(rows,)](
        logits,
        temperature,
        uniforms,
        floor,
        chunk_max,
        chunk_sum,
        chunk_argmax,
        column,
        lse,
        vocab,
        logits.stride(0),
        chunks,
        chunk_argmax.size(1),
        first,
        floor is not None,
        CHUNK,
        triton.next_power_of_2(chunks),
        num_warps=4,
    )
    return column
