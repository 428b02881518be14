"""Rotary embedding (Su et al. 2021): the angles by which megatron-core's attention rotates queries
and keys.

A score depends only on the distance of query and key, but sines and cosines of the positions are
rounded to the activations' type. So positions count from the first token of each document: packing
then changes no number.
"""

from __future__ import annotations

import functools
import math

import torch

from training.config.rope import Rope


@functools.lru_cache(maxsize=8)
def rates(rope: Rope, dim: int, device: torch.device) -> torch.Tensor:
    """Return the radians per position (dim / 2,), fp32. The order of operations is transformers',
    so that they are equal to the last bit.

    "llama3" is ``_compute_llama3_parameters`` of transformers/modeling_rope_utils.py: with the
    wavelength l = 2 pi / rate, the share s = (original / l - low) / (high - low) of the rate stays
    where l is between original / high and original / low.
    """
    plain = 1.0 / rope.base ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    if rope.kind == "default":
        return plain
    original, low, high = rope.original_positions, rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / plain
    scaled = torch.where(wavelength > original / low, plain / rope.factor, plain)
    share = (original / wavelength - low) / (high - low)
    between = (1 - share) * scaled / rope.factor + share * scaled
    is_between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(is_between, between, scaled)


@functools.lru_cache(maxsize=8)
def _angles(rope: Rope, dim: int, length: int, device: torch.device) -> torch.Tensor:
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), rates(rope, dim, device))
    return torch.cat((angles, angles), -1)


def angles(rope: Rope, dim: int, length: int, positions: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Return fp32 radians (T, B or 1, 1, dim). The two halves of a head are the pairs' first and
    second components (not interleaved).

    ``positions`` (B, T) are below ``length``; None means 0, 1, ... in each row.
    """
    table = _angles(rope, dim, length, device)
    return table[:, None, None] if positions is None else table[positions.t()][:, :, None]


def of_documents(ids: torch.Tensor) -> torch.Tensor:
    """Return the position (B, T) of each token in its document; ``ids`` (B, T) are those of
    training.models.attention.Documents."""
    index = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(1).values
