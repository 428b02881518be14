"""BLOOM's own parts of the rollout engine's forward pass: ALiBi, a norm after the embedding, GELU
in its tanh form."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from training.models import decoder
from training.models.attention import rank_slopes


class Decoder(decoder.Decoder):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.slopes = rank_slopes(self.shape.heads, self.rank * self.heads, self.heads, self.device)

    def embed(self, tokens):
        return F.layer_norm(
            super().embed(tokens), (self.shape.hidden,), *self.pair("embedding_layernorm"), self.shape.norm_eps
        )

    def feed_forward(self, normed, block) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = block["mlp.linear_fc2"]
        return F.linear(F.gelu(F.linear(normed, *block["mlp.linear_fc1"]), approximate="tanh"), weight), bias
