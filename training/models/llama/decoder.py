"""Llama's own parts of the rollout engine's forward pass: rotary embedding and SwiGLU. (The engine
computes a norm without a bias as RMSNorm.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.models import decoder, rotary
from training.models.llama.module import swiglu


class Decoder(decoder.Decoder):
    def place(self, query, key, block, batch):
        if "rotary" not in batch.derived:
            angles = rotary.angles(
                self.shape.rope, self.head_dim, self.shape.max_positions, batch.position[None], self.device
            )
            batch.derived["rotary"] = angles.cos(), angles.sin()
        cosine, sine = batch.derived["rotary"]  # (T, 1, 1, D)
        return _rotate(query, cosine, sine), _rotate(key, cosine[:, 0], sine[:, 0])

    def feed_forward(self, normed, block) -> tuple[torch.Tensor, None]:
        widened = F.linear(normed, block["mlp.linear_gate_up"][0])
        return F.linear(swiglu(widened), block["mlp.linear_fc2"][0]), None


def _rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotate each pair of components by its angle, in fp32. The halves of a head are the pairs'
    first and second components."""
    first, second = x.chunk(2, -1)
    return (x * cosine + torch.cat((-second, first), -1) * sine).to(x.dtype)
