"""Attention with linear biases (ALiBi, Press et al. 2022) as megatron-core's ``core_attention``."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule


def alibi_slopes(heads: int) -> torch.Tensor:
    """Slope of each head (heads,), fp32. For a head count that is no power of two, Press et al.'s interpolation, as BLOOM does it."""
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-(2.0 ** -(math.log2(power) - 3)))
    slopes = [base**i for i in range(1, power + 1)]
    if power != heads:
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
        slopes += [extra**i for i in range(1, 1 + 2 * min(power, heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def causal_alibi(heads: int, first: int, count: int, queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Additive bias (1, count, queries, keys) of heads [first, first + count): slope * (key - query), -inf for later keys.

    The last query sits at the last key, so a cached prefix (keys > queries) needs nothing else. Distances are relative to the
    query: near keys, which matter, stay exact in bf16. One tensor serves all layers.
    """
    slopes = alibi_slopes(heads)[first : first + count].to(device)
    distance = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
    bias = slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf")).to(dtype)[None]


class AlibiAttention(MegatronModule):
    """Causal scaled-dot-product attention with ALiBi over this rank's heads.

    query (Tq, B, heads, D), key and value (Tk, B, heads, D) -> (Tq, B, heads * D). ``attention_mask`` (B, 1, 1, Tk) is True at
    keys that nobody may see (left padding). Dropout is always off. Context parallelism is refused.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 cp_comm_type=None, pg_collection=None):
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise ValueError(f"context_parallel_size = {config.context_parallel_size}: ALiBi attention has no context parallelism; use 1")
        group = pg_collection.tp
        self.heads = config.num_attention_heads
        self.count = self.heads // group.size()
        self.first = group.rank() * self.count
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        assert packed_seq_params is None and attention_bias is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        bias = causal_alibi(self.heads, self.first, self.count, query.size(2), key.size(2), query.device, query.dtype)
        if attention_mask is not None:
            # A finite minimum: the rows of padding queries see nothing and must not become NaN.
            bias = bias.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)
        return out.permute(2, 0, 1, 3).flatten(2)
