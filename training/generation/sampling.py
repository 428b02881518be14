"""From logits to tokens, in plain torch: what the CPU runs, and what the GPU's kernels (sampling_kernels.py) are held against."""

from __future__ import annotations

import torch


def choose(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, top_k: torch.Tensor | None = None,
           top_p: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (B,) int64 and their log-probabilities (B,) fp32 from ``logits`` (B, V) fp32.

    ``temperature``, ``uniforms`` in [0, 1), ``top_k`` and ``top_p``: (B,) each; temperature 0 = greedy. Sampling is by the inverse
    of the cumulative distribution, so that a row's token depends on its own logits and draw alone.
    """
    greedy = temperature == 0
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
    kept = scaled if top_k is None else truncate(scaled, top_k, top_p)
    cumulative = kept.softmax(-1).cumsum(-1)
    # Scaled by the last entry, which rounding leaves beside 1: the draw can't fall behind it.
    threshold = uniforms.to(cumulative.dtype) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1).clamp(max=logits.size(-1) - 1)
    token = torch.where(greedy, logits.argmax(-1), token)
    return token, scaled.log_softmax(-1).gather(-1, token[:, None]).squeeze(1)


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """``logits`` (B, V) with -inf outside top-k (0 = all), then outside top-p of what is left.

    A token stays while those strictly more likely number fewer than k and weigh less than p: equals stay or go together.
    """
    ordered = logits.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k, logits.size(-1)).clamp(max=logits.size(-1)).long() - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last[:, None]), float("-inf"))
    probabilities = ordered.softmax(-1)
    above = probabilities.cumsum(-1) - probabilities  # of equals the first has the smallest sum: if one stays, all do
    inside = (above < top_p[:, None]) | (top_p[:, None] >= 1)
    inside &= ordered > float("-inf")
    inside[:, 0] = True
    floor = ordered.gather(-1, inside.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < floor, float("-inf"))


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """The repetition penalty (B,) on the ``logits`` (B, V) of tokens that were ``seen`` (B, V) bool."""
    changed = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, changed, logits)
