"""The engine's operations in plain torch: what the CPU runs, and the reference of the GPU's kernels
(triton_ops.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.generation.sampling import choose, pick, summarise
from training.models.kv_cache import Batch

__all__ = ["attend", "choose", "pick", "residual_norm", "summarise", "write"]


def residual_norm(hidden, delta, bias, weight, norm_bias, eps: float) -> torch.Tensor:
    """``hidden`` (T, H) fp32 += ``delta`` (T, H) + ``bias`` (H,) in place (None: nothing); its norm
    (T, H) in the weight's type: a layer norm, without ``norm_bias`` an RMSNorm."""
    if delta is not None:
        hidden += delta if bias is None else delta.to(hidden.dtype) + bias
    if norm_bias is None:
        return F.rms_norm(hidden, hidden.shape[-1:], weight.to(hidden.dtype), eps).to(weight.dtype)
    return F.layer_norm(hidden, hidden.shape[-1:], weight.to(hidden.dtype), norm_bias.to(hidden.dtype), eps).to(
        weight.dtype
    )


def write(cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Keys and values (T, heads, D) into a layer's ``cache`` (2, pages, heads, page, D)."""
    cache[0][batch.pages, :, batch.offsets] = key
    cache[1][batch.pages, :, batch.offsets] = value


def attend(
    cache: torch.Tensor, query: torch.Tensor, batch: Batch, slopes: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Causal attention of ``query`` (T, kv_heads, group, D) over a layer's cache -> (T, kv_heads *
    group * D).

    ``slopes`` (kv_heads * group,) fp32 of ALiBi, or None. Head h reads key-value head h // group.
    """
    total, kv_heads, group, dim = query.shape
    sequences, page = len(batch.lengths), cache.size(3)
    used = -(-batch.longest // page)
    index = (
        batch.table[:, :used].long()[:, None, :] * kv_heads + torch.arange(kv_heads, device=query.device)[None, :, None]
    )
    keys, values = (part.flatten(0, 1)[index].view(sequences, kv_heads, used * page, dim) for part in cache)
    if "bias" not in batch.derived:
        batch.derived["bias"] = _bias(batch, used * page, slopes, query.dtype)
    if batch.longest_query == 1:
        padded = query.reshape(sequences, kv_heads * group, 1, dim)
    else:
        padded = query.new_zeros(sequences, batch.longest_query, kv_heads * group, dim)
        owner, place = _places(batch, total)
        padded[owner, place] = query.flatten(1, 2)
        padded = padded.transpose(1, 2)
    if group > 1:
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(padded, keys, values, attn_mask=batch.derived["bias"], scale=scale)
    out = out[:, :, 0] if batch.longest_query == 1 else out.transpose(1, 2)[owner, place]
    return out.reshape(total, -1)


def _places(batch: Batch, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) sequence and (T,) place among its new tokens, of each token."""
    if "places" not in batch.derived:
        token = torch.arange(total, device=batch.lengths.device)
        owner = torch.searchsorted(batch.starts[1:], token, right=True)
        batch.derived["places"] = owner, token - batch.starts[owner]
    return batch.derived["places"]


def _bias(batch: Batch, keys: int, slopes: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """(S, heads or 1, longest query, keys): slope * (key - query), -inf for later keys; queries of
    padding see as much as the last."""
    new = batch.starts.diff() if batch.starts is not None else torch.ones_like(batch.lengths)
    query = (batch.lengths - new)[:, None] + torch.arange(batch.longest_query, device=new.device)
    query = torch.minimum(query, batch.lengths[:, None] - 1)
    distance = torch.arange(keys, device=new.device) - query[:, None, :, None]
    bias = torch.zeros_like(distance, dtype=torch.float32) if slopes is None else slopes[:, None, None] * distance
    return bias.masked_fill(distance > 0, float("-inf")).to(dtype)
