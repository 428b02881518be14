"""From logits to tokens, in plain torch. The CPU runs this, and the GPU's kernels
(triton_sampling.py) are tested against it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def choose(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (B,) int64 and their log-probabilities (B,) fp32 from ``logits`` (B, V) fp32.

    ``temperature``, ``uniforms`` in [0, 1), ``top_k`` and ``top_p``: (B,) each; temperature 0 =
    greedy. Sampling is by the inverse of the cumulative distribution, so that a row's token depends
    on its own logits and draw alone.
    """
    greedy = temperature == 0
    scaled = logits / nonzero_temperature(temperature)[:, None]
    allowed = scaled if top_k is None else truncate(scaled, top_k, top_p)
    cumulative = allowed.softmax(-1).cumsum(-1)
    # scaled by the last entry, which rounding moves off 1: the draw can't fall behind it
    threshold = uniforms.to(cumulative.dtype) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1).clamp(max=logits.size(-1) - 1)
    token = torch.where(greedy, logits.argmax(-1), token)
    return token, scaled.log_softmax(-1).gather(-1, token[:, None]).squeeze(1)


def nonzero_temperature(temperature: torch.Tensor) -> torch.Tensor:
    """Divisor of the logits: 1 for greedy rows (temperature 0), else the temperature."""
    return torch.where(temperature == 0, 1.0, temperature)


def summarise(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summary for ``pick`` of each chunk of ``logits`` (B, C), some columns of a vocabulary:
    its largest scaled logit, the sum of exp(scaled - largest), and its first largest column among
    these C; (B, chunks) each. Here a chunk is all C columns."""
    scaled = logits / nonzero_temperature(temperature)[:, None]
    chunk_max = scaled.amax(-1, keepdim=True)
    anchor = torch.where(chunk_max == float("-inf"), 0.0, chunk_max)  # a chunk of -inf alone weighs 0
    return chunk_max, (scaled - anchor).exp().sum(-1, keepdim=True), logits.argmax(-1, keepdim=True)


def pick(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    chunk_max: torch.Tensor,
    chunk_sum: torch.Tensor,
    chunk_argmax: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """The chosen column (B,) int64 of ``logits`` (B, C), -1 where it is none of these.

    ``chunk_max``, ``chunk_sum`` (B, chunks): ``summarise``'s of the whole vocabulary, which alone
    decide in which chunk the choice falls; ``chunk_argmax``: of these C columns, whose first chunk
    is the whole's number ``first``."""
    peak = chunk_max.amax(-1, keepdim=True)
    weights = chunk_sum * (chunk_max - peak).exp()
    cumulative = weights.cumsum(-1)
    threshold = (uniforms * cumulative[:, -1])[:, None]  # below the last sum, also when rounded
    chunk = torch.searchsorted(cumulative, threshold, right=True)
    chunk = torch.where(temperature[:, None] == 0, chunk_max.argmax(-1, keepdim=True), chunk)
    inside = (logits / nonzero_temperature(temperature)[:, None] - peak).exp()
    running = F.pad(cumulative, (1, 0)).gather(-1, chunk) + inside.cumsum(-1)
    # The threshold is not below what stands before the chunk: the column found is one where the sum
    # rises. But rounding may leave the chunk's last sum below the threshold: the last column with
    # any probability is the limit.
    last = torch.where(inside > 0, torch.arange(inside.size(1), device=inside.device), 0).amax(-1, keepdim=True)
    column = torch.searchsorted(running, threshold, right=True).minimum(last)
    column = torch.where(temperature[:, None] == 0, chunk_argmax, column)
    return torch.where(chunk == first, column, -1).squeeze(1)


def logprob(scaled: torch.Tensor, chunk_max: torch.Tensor, chunk_sum: torch.Tensor) -> torch.Tensor:
    """Log-probability of scaled logits (B,) in the distribution that ``chunk_max`` and
    ``chunk_sum`` (B, chunks) summarise. Only differences of logits are computed, so large ones cost
    no digits."""
    peak = chunk_max.amax(-1)
    return (scaled - peak) - (chunk_sum * (chunk_max - peak[:, None]).exp()).sum(-1).log()


def truncate(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """``logits`` (B, V) with -inf outside top-k (0 = all), then outside top-p of what is left.

    A token stays while those strictly more likely number fewer than k and weigh less than p: equals
    stay or go together.
    """
    ordered = logits.sort(-1, descending=True).values
    last = torch.where(top_k > 0, top_k, logits.size(-1)).clamp(max=logits.size(-1)).long() - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, last[:, None]), float("-inf"))
    probabilities = ordered.softmax(-1)
    # of equals the first has the smallest sum: if one stays, all do
    above = probabilities.cumsum(-1) - probabilities
    inside = (above < top_p[:, None]) | (top_p[:, None] >= 1)
    inside &= ordered > float("-inf")
    inside[:, 0] = True
    floor = ordered.gather(-1, inside.sum(-1, keepdim=True) - 1)
    return logits.masked_fill(logits < floor, float("-inf"))


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Apply the repetition penalty (B,) to the ``logits`` (B, V) of tokens that are ``seen`` (B, V)
    bool."""
    changed = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, changed, logits)
