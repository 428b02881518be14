"""BLOOM's inference forward pass on plain weights: all of the engine that knows the family.

Another family is another file with the same attributes, ``fill`` and ``next_logits``: its norms, feed-forward and positions (rotary ones
are applied to queries and keys before ``ops.write``) are its own; the operations take fewer key-value heads than heads, and no slopes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.generation.cache import Batch
from training.model.attention import rank_slopes
from training.shape import Shape


class BloomDecoder:
    """This rank's tensor-parallel slice of all layers. ``weights``: megatron-core's names with the layers' numbers in the whole model.

    ``group``: the generation's tensor-parallel group, None for one rank. Weights are read where they are, never copied.
    """

    def __init__(self, shape: Shape, weights: Mapping[str, torch.Tensor], ops: ModuleType, group=None):
        self.shape, self.ops, self.group = shape, ops, group
        size, rank = (group.size(), group.rank()) if group else (1, 0)
        self.layers, self.hidden_size, self.vocab = shape.layers, shape.hidden, shape.vocab
        self.heads = self.kv_heads = shape.heads // size
        self.head_dim = shape.hidden // shape.heads
        self.embedding = weights["embedding.word_embeddings.weight"]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.slopes = rank_slopes(shape.heads, rank * self.heads, self.heads, self.device)
        self.first_row = rank * self.embedding.size(0)
        self.head = self.embedding if shape.tied else weights["output_layer.weight"]
        self.norms = {name: self._pair(weights, name) for name in ("embedding_layernorm", "decoder.final_layernorm")}
        self.blocks = [{name: self._pair(weights, f"decoder.layers.{layer}.{name}") for name in
                        ("input_layernorm", "self_attention.linear_qkv", "self_attention.linear_proj", "pre_mlp_layernorm",
                         "mlp.linear_fc1", "mlp.linear_fc2")} for layer in range(shape.layers)]

    @staticmethod
    def _pair(weights, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def fill(self, tokens: torch.Tensor, cache: torch.Tensor, batch: Batch) -> None:
        """Keys and values of ``tokens`` (T,) into the cache (layers, 2, pages, heads, page, D). Of the last layer nothing else is made."""
        self._run(tokens, cache, batch, only_fill=True)

    def next_logits(self, tokens: torch.Tensor, cache: torch.Tensor, batch: Batch) -> torch.Tensor:
        """fp32 logits (T, vocab) that follow each of ``tokens`` (T,), whose keys and values are written, too."""
        hidden = self._run(tokens, cache, batch, only_fill=False)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            logits = torch.mm(hidden, self.head.t(), out_dtype=torch.float32)  # bf16 would be off by up to 1/256 of a logit
        else:
            logits = F.linear(hidden, self.head).float()
        if self.group:
            columns = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(columns, logits, group=self.group)
            logits = torch.cat(columns, -1)
        return logits[:, : self.vocab]

    def _run(self, tokens, cache, batch: Batch, only_fill: bool) -> torch.Tensor | None:
        ops, eps, scale = self.ops, self.shape.eps, self.head_dim**-0.5
        hidden = F.layer_norm(self._embed(tokens), (self.hidden_size,), *self.norms["embedding_layernorm"], eps)
        delta = bias = None
        for layer, block in enumerate(self.blocks):
            normed = ops.residual_norm(hidden, delta, bias, *block["input_layernorm"], eps)
            query, key, value = F.linear(normed, *block["self_attention.linear_qkv"]).view(-1, self.heads, 3, self.head_dim).unbind(2)
            ops.write(cache[layer], key, value, batch)
            if only_fill and layer == self.layers - 1:
                return None
            attended = ops.attend(cache[layer], query.unsqueeze(2), batch, self.slopes, scale)
            weight, bias = block["self_attention.linear_proj"]
            delta = self._sum(F.linear(attended, weight))
            normed = ops.residual_norm(hidden, delta, bias, *block["pre_mlp_layernorm"], eps)
            widened = F.gelu(F.linear(normed, *block["mlp.linear_fc1"]), approximate="tanh")
            weight, bias = block["mlp.linear_fc2"]
            delta = self._sum(F.linear(widened, weight))
        return ops.residual_norm(hidden, delta, bias, *self.norms["decoder.final_layernorm"], eps)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self.group:
            return F.embedding(tokens, self.embedding)
        local = tokens - self.first_row
        here = (local >= 0) & (local < self.embedding.size(0))
        return self._sum(F.embedding(torch.where(here, local, 0), self.embedding) * here[:, None])

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        if self.group:
            dist.all_reduce(partial, group=self.group)
        return partial
