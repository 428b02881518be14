"""Qwen 3's part of the rollout engine: Llama's, with each head's query and key normed before the
rotation."""

from __future__ import annotations

import torch.nn.functional as F

from training.models.llama import decoder


class Decoder(decoder.Decoder):
    def place(self, query, key, block, batch):
        eps = self.shape.norm_eps
        query = F.rms_norm(query, query.shape[-1:], block["self_attention.q_layernorm"][0], eps)
        key = F.rms_norm(key, key.shape[-1:], block["self_attention.k_layernorm"][0], eps)
        return super().place(query, key, block, batch)
