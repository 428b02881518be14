"""Causal attention written out in double precision, and batches to try a backend on."""

from __future__ import annotations

import torch

from training.models.attention import Documents, alibi_slopes


def reference(query, key, value, slopes, scale, ids):
    """query (T, B, H, D), key and value (T, B, G, D) -> (T, B, H * D), all in fp64: query head h
    reads key-value head h * G // H.

    ``slopes`` (H,) of ALiBi or None; ``ids`` (B, T) or None: a token sees its own document up to
    itself.
    """
    serving = torch.arange(query.size(2)) * key.size(2) // query.size(2)
    key, value = key[:, :, serving], value[:, :, serving]
    query, key, value = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    position = torch.arange(query.size(2), device=query.device)
    distance = position - position[:, None]
    hidden = (distance > 0)[None, None]
    if ids is not None:
        hidden = hidden | (ids[:, None, :, None] != ids[:, None, None, :])
    scores = query @ key.transpose(-1, -2) * scale
    if slopes is not None:
        scores = scores + slopes.double()[:, None, None] * distance
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def document_ids(kind: str, rows: int, length: int, device="cpu") -> torch.Tensor | None:
    """(rows, length) of a batch: "plain" (None), "padded" (one document a row, then padding) or
    "packed" (many, one of one token)."""
    if kind == "plain":
        return None
    generator = torch.Generator().manual_seed(7)
    ids = torch.zeros(rows, length, dtype=torch.long)
    for row in ids:
        ends = [int(torch.randint(1, length, (), generator=generator))]
        if kind == "packed":
            ends = sorted({1, length // 3, length - 1, *ends})
        for end in ends:
            row[end:] += 1
    return ids.to(device)


def errors(
    kernel,
    ids,
    rows: int,
    length: int,
    heads: int,
    dim: int,
    dtype=torch.float32,
    device="cpu",
    backward=True,
    groups: int = 0,
) -> list[float]:
    """Relative L2 errors of a backend against ``reference`` on the same rounded inputs: [output] or
    [output, worst of dQ, dK, dV].

    With ``groups`` key-value heads and no slopes, or ALiBi and as many key-value heads as heads.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(length, rows, count, dim, generator=generator).to(device, dtype).requires_grad_(backward)
        for count in (heads, groups or heads, groups or heads)
    ]
    exact = [x.detach().double().requires_grad_(backward) for x in inputs]
    weight = torch.randn(length, rows, heads * dim, generator=generator).to(device, dtype)
    slopes, scale = None if groups else alibi_slopes(heads).to(device), dim**-0.5
    ours = kernel(*inputs, slopes, scale, None if ids is None else Documents(ids))
    theirs = reference(*exact, slopes, scale, ids)
    found = [relative(ours, theirs)]
    if backward:
        ours.backward(weight)
        theirs.backward(weight.double())
        found.append(max(relative(mine.grad, right.grad) for mine, right in zip(inputs, exact, strict=True)))
    return found


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """|ours - exact| / |exact|, Euclidean, in double precision; where ``exact`` is 0 (one token: dQ, dK)
    |ours|."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return (ours - exact).norm().item() / (exact.norm().item() or 1.0)
