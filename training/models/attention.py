"""Causal attention as megatron-core's ``core_attention``, with linear biases (ALiBi, Press et al.
2022) or without.

This file knows heads, tensor-parallel ranks and packed documents. The arithmetic is in
training.models.attention_backends.
"""

from __future__ import annotations

import functools
import math

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from training.errors import InvariantError
from training.models import attention_backends


def alibi_slopes(heads: int) -> torch.Tensor:
    """Return the slope of each head (heads,), fp32.

    A head count that is no power of two takes Press et al.'s interpolation, as BLOOM does.
    """
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** (-(2.0 ** -(math.log2(power) - 3)))
    slopes = [base**i for i in range(1, power + 1)]
    if power != heads:
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * power) - 3)))
        slopes += [extra**i for i in range(1, 1 + 2 * min(power, heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def rank_slopes(heads: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return the slopes of heads [first, first + count) on ``device``.

    They are cached here, outside the module, because a cast of the model would round them to bf16.
    """
    return alibi_slopes(heads)[first : first + count].to(device)


class Documents(PackedSeqParams):
    """The document of each token of a packed batch: ``ids`` (B, T) int, a run of equal ids for each
    document. With ``ids`` None each row is one document.

    A token sees the tokens of its own document up to itself. Padding is a document of its own.
    Backends compute what they derive from the ids once for all layers. ``compiled``: layers run
    compiled.
    """

    def __init__(self, ids: torch.Tensor | None, compiled: bool = False):
        super().__init__(qkv_format="sbhd")
        self.ids, self.compiled = ids, compiled
        self._separated: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def from_lengths(cls, cumulative: torch.Tensor, length: int) -> Documents:
        """Make one row (1, ``length``) from ``cumulative`` (documents + 1,), which is 0 and the end
        of each document. The rest of the row is padding."""
        position = torch.arange(length, device=cumulative.device)
        return cls(torch.searchsorted(cumulative[1:].contiguous(), position, right=True)[None])

    @functools.cached_property
    def cross_document_mask(self) -> torch.Tensor:
        """(B, 1, T, T), True where query and key belong to different documents."""
        return (self.ids[:, :, None] != self.ids[:, None, :])[:, None]

    def separated(self, bias: torch.Tensor) -> torch.Tensor:
        """Return ``bias`` (1, heads, T, T) with -inf between documents: (B, heads, T, T).

        It is one tensor for all layers, because each saves it for its backward pass.
        """
        if self._separated is None or self._separated[0] is not bias:
            self._separated = bias, bias.masked_fill(self.cross_document_mask, float("-inf"))
        return self._separated[1]

    @functools.cached_property
    def cumulative(self) -> torch.Tensor:
        """``cu_seqlens`` (documents + 1,) int32 of all rows, one after the other."""
        changes = torch.ones_like(self.ids, dtype=torch.bool)
        changes[:, 1:] = self.ids[:, 1:] != self.ids[:, :-1]
        starts = changes.flatten().nonzero().squeeze(1)
        return torch.cat((starts, starts.new_tensor([self.ids.numel()]))).int()

    @functools.cached_property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return int(self.cumulative.diff().max())

    @functools.cached_property
    def blocks(self):
        """FlexAttention's block mask. Compiled layers read it, so make it before they run."""
        return attention_backends.document_blocks(self.ids)


class CausalAttention(MegatronModule):
    """Causal scaled-dot-product attention over this rank's heads, with ALiBi where the family has
    it.

    It maps query (Tq, B, heads, D), key and value (Tk, B, groups, D) to (Tq, B, heads * D).
    ``packed_seq_params`` is the batch's Documents. Dropout is always off. Generation has attention
    of its own (training.generation).
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        if config.context_parallel_size != 1:
            raise InvariantError(f"context_parallel_size = {config.context_parallel_size}: TrainerConfig refuses it")
        group = pg_collection.tp
        self.heads = config.num_attention_heads
        self.count = self.heads // group.size()
        self.first = group.rank() * self.count
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.backend = config.core_attention
        self.attend = attention_backends.kernel(self.backend, config.kv_channels, config.params_dtype)
        # A plain attribute: a cast of the model would round a buffer to bf16.
        device = torch.device(torch.cuda.current_device())
        self.slopes = rank_slopes(self.heads, self.first, self.count, device) if config.alibi else None

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        if attention_bias is not None or attention_mask is not None:
            raise InvariantError(
                "attention_bias or attention_mask was passed: this attention has its own bias and mask"
            )
        # FlexAttention would compile a kernel for each length that is no multiple of its blocks.
        if self.backend == "sdpa" or (self.backend == "flex" and query.size(0) % attention_backends.FLEX_BLOCK):
            return attention_backends.sdpa(query, key, value, self.slopes, self.scale, packed_seq_params)
        documents = packed_seq_params
        if documents is not None and documents.ids is None and self.backend != "flex":
            documents = None
        return self.attend(query, key, value, self.slopes, self.scale, documents)
