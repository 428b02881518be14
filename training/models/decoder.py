"""The rollout engine's forward pass on plain weights, as far as all families share it. A family's
own parts are in training/models/NAME/decoder.py."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.config.shape import EMBEDDING, OUTPUT, Shape
from training.models.kv_cache import Batch


class Decoder:
    """This rank's tensor-parallel slice of all layers.

    ``weights`` are named as in megatron-core, with the layers' numbers in the full model. They are
    never copied. ``group`` is generation's tensor-parallel group, None for one rank.
    """

    slopes: torch.Tensor | None = None
    """ALiBi's (heads,) fp32, where the family has it."""

    def __init__(self, shape: Shape, weights: Mapping[str, torch.Tensor], ops: ModuleType, group=None):
        self.shape, self.ops, self.group = shape, ops, group
        self.size, self.rank = (group.size(), group.rank()) if group else (1, 0)
        self.layers, self.vocab, self.head_dim = shape.layers, shape.sampled_vocab, shape.head_dim
        self.heads, self.kv_heads = shape.heads // self.size, shape.kv_heads // self.size
        self.weights = weights
        self.embedding = weights[EMBEDDING]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.head = self.embedding if shape.tied else weights[OUTPUT]
        self.last_norm = self.pair("decoder.final_layernorm")
        names = [weight.key.removesuffix(".weight") for weight in shape.table.layer if weight.key.endswith(".weight")]
        self.blocks = [
            {name: self.pair(f"decoder.layers.{layer}.{name}") for name in names} for layer in range(shape.layers)
        ]

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias, None for a missing bias."""
        return self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (T, H) of ``tokens`` (T,)."""
        if not self.group:
            return F.embedding(tokens, self.embedding)
        local = tokens - self.rank * self.embedding.size(0)
        is_local = (local >= 0) & (local < self.embedding.size(0))
        return self.sum(F.embedding(torch.where(is_local, local, 0), self.embedding) * is_local[:, None])

    def place(self, query: torch.Tensor, key: torch.Tensor, block, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return query (T, kv_heads, group, D) and key (T, kv_heads, D) as attention reads them.

        A family overrides this to apply norms of ``block`` (the layer's weights) or positions.
        """
        return query, key

    def feed_forward(self, normed: torch.Tensor, block) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return this rank's part of the output (T, H), and the bias, which is added once to the
        sum over ranks."""
        raise NotImplementedError

    def workspace(self, tokens: int) -> int:
        """Return the peak bytes of a forward pass of ``tokens``, which is in the feed-forward
        part."""
        feed_forward = 2 * (2 if self.shape.gated else 1) * self.shape.ffn_hidden // self.size
        residual = 6 * max(self.shape.hidden, self.shape.attention_width)
        return tokens * (feed_forward + residual) * self.dtype.itemsize

    def prefill(self, tokens: torch.Tensor, cache: torch.Tensor, batch: Batch) -> None:
        """Write keys and values of ``tokens`` (T,) into the cache (layers, 2, pages, heads, page,
        D). The last layer computes nothing else."""
        self._run(tokens, cache, batch, only_cache=True)

    def last_hidden(self, tokens: torch.Tensor, cache: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Write keys and values of ``tokens`` (T,) and return their last hidden states (T, H)."""
        return self._run(tokens, cache, batch, only_cache=False)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 logits of the next tokens from last hidden states (T, H).

        One rank returns (T, vocab). Each of several returns its own columns (T, padded vocabulary /
        ranks), -inf beyond the vocabulary, so that all ranks have equal shapes and kernels.
        """
        if hidden.is_cuda and hidden.dtype != torch.float32:
            # bf16 would be off by up to 1/256 of a logit
            logits = torch.mm(hidden, self.head.t(), out_dtype=torch.float32)
        else:
            logits = F.linear(hidden, self.head).float()
        if not self.group:
            return logits[:, : self.vocab]
        logits[:, max(self.vocab - self.rank * logits.size(1), 0) :] = float("-inf")
        return logits

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Return all columns (T, vocab) of the result of ``logits`` on every rank."""
        if not self.group:
            return logits
        columns = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(columns, logits, group=self.group)
        return torch.cat(columns, -1)[:, : self.vocab]

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum ``partial`` over tensor-parallel ranks, in place."""
        if self.group:
            dist.all_reduce(partial, group=self.group)
        return partial

    def _run(self, tokens, cache, batch: Batch, only_cache: bool) -> torch.Tensor | None:
        ops, eps, scale, group = self.ops, self.shape.norm_eps, self.head_dim**-0.5, self.heads // self.kv_heads
        # The residual stream is fp32: in bf16, rounding two additions in each layer would cause
        # most of the error of a log-probability.
        hidden = self.embed(tokens).float()
        delta = bias = None
        for layer, block in enumerate(self.blocks):
            normed = ops.residual_norm(hidden, delta, bias, *block["input_layernorm"], eps)
            mixed = F.linear(normed, *block["self_attention.linear_qkv"]).view(
                -1, self.kv_heads, group + 2, self.head_dim
            )
            query, key = self.place(mixed[:, :, :group], mixed[:, :, group], block, batch)
            ops.write(cache[layer], key, mixed[:, :, group + 1], batch)
            if only_cache and layer == self.layers - 1:
                return None
            attended = ops.attend(cache[layer], query, batch, self.slopes, scale)
            weight, bias = block["self_attention.linear_proj"]
            delta = self.sum(F.linear(attended, weight))
            normed = ops.residual_norm(hidden, delta, bias, *block["pre_mlp_layernorm"], eps)
            delta, bias = self.feed_forward(normed, block)
            delta = self.sum(delta)
        return ops.residual_norm(hidden, delta, bias, *self.last_norm, eps)
