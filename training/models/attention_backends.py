"""The kernels that compute causal attention, and the choice of one for a run.

Every backend takes query (Tq, B, H, D), key and value (Tk, B, G, D) with G dividing H, ALiBi's
slopes (H,) fp32 or None, the scale, and the batch's Documents or None. It returns (Tq, B, H * D).

Relative L2 error against fp64, forward / worst of dQ, dK, dV: fp32 below 1e-5 / 2e-5, bf16 below
1e-2 / 2e-2. The inputs are rounded first, so the error is that of rounding probabilities and
results.
"""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F

from training.errors import ConfigError

FLEX_BLOCK = 128
"""Tokens of a block of FlexAttention's mask: sequence lengths on CUDA are multiples of it."""
FLEX_SMALLEST_HEAD = 16
"""FlexAttention's kernels take no smaller head dimension."""
FLEX_UNPACKED = {"ROWS_GUARANTEED_SAFE": True}
"""Option for rows of one document: there every query sees a key of the first block, and
FlexAttention need not look for queries that see none. In packed rows that block may belong to
another document, and such queries would give NaN."""
FLEX_HOPPER_64 = dict(
    fwd_BLOCK_M=128,
    fwd_BLOCK_N=64,
    fwd_num_stages=3,
    fwd_num_warps=4,
    bwd_BLOCK_M1=32,
    bwd_BLOCK_N1=64,
    bwd_BLOCK_M2=64,
    bwd_BLOCK_N2=32,
    bwd_num_stages=3,
    bwd_num_warps=4,
)
"""The fastest of 15 tilings for bf16 heads of 64 dimensions on an H100. Heads of 128 use torch's
own: the tiling that was faster alone was not faster in a step (docs/evidence/performance.md)."""
PACKAGES = {
    "flash": ("flash_attn", "flash_attn_varlen_func"),
    "te": ("transformer_engine.pytorch", "DotProductAttention"),
}
INSTALL = {
    "flash": "pip install flash-attn --no-build-isolation",
    "te": "pip install transformer-engine[pytorch] --no-build-isolation",
}


def choose(requested: str, device: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return a run's backend: "sdpa", "flex", "flash" or "te". ``requested`` is
    TrainerConfig.attention.

    "auto" is SDPA on the CPU. On CUDA it is FlexAttention, which was measured, or SDPA where heads
    are too small for FlexAttention. Raises ConfigError if the requested backend can't run.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    problems = dict.fromkeys(KERNELS, "")
    if head_dim < FLEX_SMALLEST_HEAD:
        problems["flex"] = f"needs heads of {FLEX_SMALLEST_HEAD} dimensions or more, the model's have {head_dim}"
    for name in PACKAGES:
        if not available(name):
            problems[name] = f"is not installed here ({INSTALL[name]})"
        elif not half:
            problems[name] = 'needs precision = "bf16"'
    if device != "cuda":
        problems |= dict.fromkeys(("flex", *PACKAGES), "needs a GPU")
    if requested == "auto":
        order = ("flex", "sdpa") if device == "cuda" else ("sdpa",)
        return next(name for name in order if not problems[name])
    if problems[requested]:
        raise ConfigError(f'attention = "{requested}" {problems[requested]}; set attention = "auto"')
    return requested


@functools.cache
def available(name: str) -> bool:
    """Return True if the package of "flash" or "te" is installed and complete."""
    package, attribute = PACKAGES[name]
    try:
        return hasattr(importlib.import_module(package), attribute)
    # Transformer Engine without its compiled part raises RuntimeError, a wrong CUDA OSError.
    except (ImportError, OSError, RuntimeError):
        return False


@functools.lru_cache(maxsize=1)  # the device holds heads x length^2 numbers
def causal_alibi(
    slopes: tuple[float, ...], queries: int, keys: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the additive bias (1, slopes, queries, keys): slope * (key - query), -inf for later
    keys. A single slope of 0 gives a causal mask.

    The last query stands at the last key, so a cached prefix (keys > queries) needs nothing else.
    Distances are relative to the query, so that near keys, which matter, are exact in bf16. One
    tensor serves all layers.
    """
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    bias = torch.tensor(slopes, dtype=torch.float32, device=device)[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf")).to(dtype)[None]


@functools.lru_cache(maxsize=8)
def _numbers(slopes: torch.Tensor) -> tuple[float, ...]:
    return tuple(slopes.tolist())


def sdpa(query, key, value, slopes, scale, documents):
    """torch's scaled-dot-product attention, with a bias tensor of all pairs where one is needed.

    It is for the CPU, and for runs too short for FlexAttention's minute of compiling.
    """
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if slopes is None and documents is None and query.size(2) == key.size(2):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.size(1) > key.size(1)
        )
        return out.permute(2, 0, 1, 3).flatten(2)
    # With a bias and grouped queries torch has no fused kernel, only one that stores all scores.
    if query.is_cuda:
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), 1) for x in (key, value))
    numbers = (0.0,) if slopes is None else _numbers(slopes)
    bias = causal_alibi(numbers, query.size(2), key.size(2), query.device, query.dtype)
    if documents is not None:
        bias = documents.separated(bias)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=scale, enable_gqa=query.size(1) > key.size(1)
    )
    return out.permute(2, 0, 1, 3).flatten(2)


def expect_many_shapes() -> None:
    """Let torch's compiler make kernels for one shape at first, and for any shape from the second
    shape on.

    Packed rows have another shape at nearly every step, and the kernels of one shape take about 8 s
    to compile. bloom-560m on Anthropic HH took 3 minutes for its first 37 steps that way. With
    kernels for any shape it compiled for 45 s, in three of its first four steps.
    """
    torch._dynamo.config.automatic_dynamic_shapes = True
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)


@functools.cache
def _compiled(name: str):
    from torch.nn.attention import flex_attention

    expect_many_shapes()
    return torch.compile(getattr(flex_attention, name))


def alibi_score(slopes: torch.Tensor, exact: bool = True):
    """Return ALiBi as FlexAttention's ``score_mod``, fp32.

    Softmax ignores what all keys of a query have in common, so slope * key is as good as slope *
    (key - query), and it is one number per key instead of one per pair. Its rounding, 2^-24 of
    slope * length, is far below that of probabilities to bf16. ``exact`` avoids it.
    """

    def relative(score, batch, head, query, key):
        return score + slopes[head] * (key - query)

    def absolute(score, batch, head, query, key):
        return score + slopes[head] * key

    return relative if exact else absolute


_same_score = functools.lru_cache(maxsize=8)(alibi_score)


def _causal(batch, head, query, key):
    return query >= key


@functools.lru_cache(maxsize=16)
def causal_blocks(length: int, device: torch.device):
    """Return the block mask of an unpacked causal batch; one is made for each length."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(_causal, None, None, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK)


def document_blocks(ids: torch.Tensor):
    """Return the block mask of a packed batch with documents ``ids`` (B, T): causal within each
    document."""
    from torch.nn.attention import flex_attention

    def mask(batch, head, query, key):
        return (query >= key) & (ids[batch, query] == ids[batch, key])

    rows, length = ids.shape
    # Compiled, the (B, T, T) mask is never materialised.
    create = _compiled("create_block_mask") if ids.is_cuda else flex_attention.create_block_mask
    return create(mask, rows, None, length, length, device=ids.device, BLOCK_SIZE=FLEX_BLOCK)


def flex_options(head_dim: int, dtype: torch.dtype) -> dict:
    """Return FlexAttention's ``kernel_options`` for this GPU."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return FLEX_HOPPER_64 if hopper and dtype.itemsize == 2 and head_dim <= 64 else {}


def flex(query, key, value, slopes, scale, documents, options=None):
    """FlexAttention, compiled on CUDA. On the CPU, for tests, it runs uncompiled and without
    gradients."""
    blocks = causal_blocks(query.size(0), query.device) if documents is None else documents.blocks
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    from torch.nn.attention import flex_attention

    exact, packed = query.dtype.itemsize > 2, documents is not None and documents.ids is not None
    score = None if slopes is None else (alibi_score if torch.compiler.is_compiling() else _same_score)(slopes, exact)
    attend = flex_attention.flex_attention
    # Under the compiler it is a part of the layer's graph.
    if query.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled("flex_attention")
    out = attend(
        query,
        key,
        value,
        score_mod=score,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.size(1) > key.size(1),
        kernel_options={**(options or {}), **({} if packed else FLEX_UNPACKED)},
    )
    return out.permute(2, 0, 1, 3).flatten(2)


@torch.compiler.disable
def flash(query, key, value, slopes, scale, documents):
    """flash-attn 2. Its bias is -slope * |query - key|, which under a causal mask is ours. Packed
    rows are passed as one row with cu_seqlens."""
    import flash_attn

    length, rows = query.shape[:2]
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if documents is None:
        out = flash_attn.flash_attn_func(query, key, value, softmax_scale=scale, causal=True, alibi_slopes=slopes)
    else:
        ends, longest = documents.cumulative, documents.longest
        flat = (x.reshape(rows * length, *x.shape[2:]) for x in (query, key, value))
        out = flash_attn.flash_attn_varlen_func(
            *flat,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            alibi_slopes=slopes,
        )
    return out.reshape(rows, length, -1).transpose(0, 1).contiguous()


@functools.lru_cache(maxsize=8)
def _te_attention(heads: int, groups: int, dim: int, scale: float):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads,
        dim,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        softmax_scale=scale,
        attn_mask_type="causal",
        qkv_format="sbhd",
    )


@torch.compiler.disable
def transformer_engine(query, key, value, slopes, scale, documents):
    """Transformer Engine's attention, which chooses flash, cuDNN or unfused itself. Packed rows are
    passed as one row."""
    length, rows, heads, dim = query.shape
    attend, bias = _te_attention(heads, key.size(2), dim, scale), "no_bias" if slopes is None else "alibi"
    if documents is None:
        return attend(
            query,
            key,
            value,
            attn_mask_type="causal",
            qkv_format="sbhd",
            core_attention_bias_type=bias,
            alibi_slopes=slopes,
        )
    ends, longest = documents.cumulative, documents.longest
    flat = (x.transpose(0, 1).reshape(rows * length, -1, dim) for x in (query, key, value))
    out = attend(
        *flat,
        attn_mask_type="padding_causal",
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        core_attention_bias_type=bias,
        alibi_slopes=slopes,
    )
    return out.reshape(rows, length, heads * dim).transpose(0, 1).contiguous()


KERNELS = {"sdpa": sdpa, "flex": flex, "flash": flash, "te": transformer_engine}


def kernel(name: str, head_dim: int, dtype: torch.dtype):
    """Return the function of backend ``name`` with its options for this model."""
    return functools.partial(flex, options=flex_options(head_dim, dtype)) if name == "flex" else KERNELS[name]
