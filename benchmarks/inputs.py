"""Random weights and rows: a step's time and memory do not depend on their values."""

from __future__ import annotations

import torch

from training.distributed import groups
from training.models import lora


@torch.no_grad()
def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Matrices from a normal distribution (0, .02), the norms' weights 1, biases 0. Adapters stay
    as they are."""
    generator = torch.Generator(device=groups.device()).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if lora.ADAPTER_PREFIX in name:
            continue
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))


def packed_documents(
    rows: int, length: int, generator: torch.Generator, all_tokens: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(documents, response_mask), both (rows, length): documents about as long as Anthropic HH's
    (log-normal, 220 tokens on average; shorter in rows of up to 512 tokens).

    The mask has the last 40% of each document, or with ``all_tokens`` all but its first token.
    """
    documents = torch.zeros(rows, length, dtype=torch.long)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mean_log = 5.15 if length > 512 else 3
    for row in range(rows):
        start = number = 0
        while start < length:
            log_size = torch.randn((), generator=generator).mul(0.7).add(mean_log)
            size = int(log_size.exp().clamp(8, length))
            documents[row, start : start + size] = number
            mask[row, start + (1 if all_tokens else max(int(0.6 * size), 1)) : start + size] = True
            start, number = start + size, number + 1
    return documents, mask
