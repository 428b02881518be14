"""From logits to tokens, in plain torch: what the CPU runs, and what the GPU's kernels
(triton_sampling.py) are held against."""

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
    scaled = logits / heat(temperature)[:, None]
    kept = scaled if top_k is None else truncate(scaled, top_k, top_p)
    cumulative = kept.softmax(-1).cumsum(-1)
    # Scaled by the last entry, which rounding leaves beside 1: the draw can't fall behind it.
    threshold = uniforms.to(cumulative.dtype) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1).clamp(max=logits.size(-1) - 1)
    token = torch.where(greedy, logits.argmax(-1), token)
    return token, scaled.log_softmax(-1).gather(-1, token[:, None]).squeeze(1)


def heat(temperature: torch.Tensor) -> torch.Tensor:
    """What logits are divided by: greedy rows (0) have the log-probabilities of temperature 1."""
    return torch.where(temperature == 0, 1.0, temperature)


def summarise(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``pick`` has to know of each chunk of ``logits`` (B, C), some columns of a vocabulary:
    its largest scaled logit, the sum of exp(scaled - largest), and its first largest column among
    these C; (B, chunks) each. Here a chunk is all C columns."""
    scaled = logits / heat(temperature)[:, None]
    highest = scaled.amax(-1, keepdim=True)
    anchor = torch.where(highest == float("-inf"), 0.0, highest)  # a chunk of -inf alone weighs 0
    return highest, (scaled - anchor).exp().sum(-1, keepdim=True), logits.argmax(-1, keepdim=True)


def pick(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    highest: torch.Tensor,
    total: torch.Tensor,
    best: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """The chosen column (B,) int64 of ``logits`` (B, C), -1 where it is none of these.

    ``highest``, ``total`` (B, chunks): ``summarise``'s of the whole vocabulary, which alone decide
    in which chunk the choice falls; ``best``: of these C columns, whose first chunk is the whole's
    number ``first``.
    """
    peak = highest.amax(-1, keepdim=True)
    weights = total * (highest - peak).exp()
    cumulative = weights.cumsum(-1)
    threshold = (uniforms * cumulative[:, -1])[:, None]  # below the last sum, also when rounded
    chunk = torch.searchsorted(cumulative, threshold, right=True)
    chunk = torch.where(temperature[:, None] == 0, highest.argmax(-1, keepdim=True), chunk)
    inside = (logits / heat(temperature)[:, None] - peak).exp()
    running = F.pad(cumulative, (1, 0)).gather(-1, chunk) + inside.cumsum(-1)
    # The threshold is not below what stands before the chunk: the column found is one where the sum
    # rises. But rounding may leave the chunk's last sum below the threshold: the last column with
    # any probability is the limit.
    last = torch.where(inside > 0, torch.arange(inside.size(1), device=inside.device), 0).amax(-1, keepdim=True)
    column = torch.searchsorted(running, threshold, right=True).minimum(last)
    column = torch.where(temperature[:, None] == 0, best, column)
    return torch.where(chunk == first, column, -1).squeeze(1)


def logprob(scaled: torch.Tensor, highest: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Of scaled logits (B,) among all that ``highest`` and ``total`` (B, chunks) sum up. Only
    differences of logits are made: large ones cost no digits."""
    peak = highest.amax(-1)
    return (scaled - peak) - (total * (highest - peak[:, None]).exp()).sum(-1).log()


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
    """The repetition penalty (B,) on the ``logits`` (B, V) of tokens that were ``seen`` (B, V)
    bool."""
    changed = torch.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
    return torch.where(seen, changed, logits)
