"""Generation with a key-value cache on the training model's own layout, any TP x PP x parts. The fast engine is another part.

Prompts stand right-aligned (padding on the left, masked); ALiBi depends on distances only, so padding does not shift it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from training import parallel
from training.model.language_model import Interleaved, LanguageModel, parts

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""(logits (B, V) fp32, step) -> next tokens (B,)."""


def greedy(logits: torch.Tensor, step: int) -> torch.Tensor:
    return logits.argmax(-1)


def inverse_cdf(uniforms: torch.Tensor, temperature: float) -> Choose:
    """Sampling by the inverse of the cumulative distribution: ``uniforms`` (B, steps) in [0, 1) alone decide.

    A row's draw depends on nothing else: not on its neighbours, nor on layout, batch or interruption.
    """

    def choose(logits: torch.Tensor, step: int) -> torch.Tensor:
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        # Scaled by the last entry, which rounding leaves beside 1: the draw can't fall behind it.
        threshold = uniforms[:, step].to(logits.device, cumulative.dtype) * cumulative[:, -1]
        return torch.searchsorted(cumulative, threshold[:, None], right=True).squeeze(1).clamp(max=logits.size(-1) - 1)

    return choose


def draws(seed: int, iteration: int, rows: int, steps: int) -> torch.Tensor:
    """Uniforms (rows, steps) of an iteration's global batch: every layout and every resumed run makes the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    return torch.rand(rows, steps, generator=generator)


@torch.no_grad()
def generate(model: LanguageModel | Interleaved, prompts: torch.Tensor, prompt_mask: torch.Tensor, steps: int, choose: Choose,
             eos_id: int, pad_id: int) -> torch.Tensor:
    """Responses (B, steps) int64 on every rank: after a row's first EOS only PAD; generation ends when all rows have ended.

    ``prompts`` (B, P) left-padded, ``prompt_mask`` (B, P) True at real tokens.
    Collective over the model's tensor- and pipeline-parallel ranks.
    """
    model.eval()
    with whole_sequences(model):
        return _generate(model, prompts, prompt_mask, steps, choose, eos_id, pad_id)


@contextlib.contextmanager
def whole_sequences(model: LanguageModel | Interleaved):
    """Sequence parallelism off inside the block: one new token can't be divided over ranks. Weights are the same either way."""
    flags = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    owners = [model.config, *model.modules()]
    changed = [(owner, flag) for owner in owners for flag in flags if getattr(owner, flag, False)]
    try:
        for owner, flag in changed:
            setattr(owner, flag, False)
        yield
    finally:
        for owner, flag in changed:
            setattr(owner, flag, True)


def _generate(model: LanguageModel | Interleaved, prompts: torch.Tensor, prompt_mask: torch.Tensor, steps: int, choose: Choose,
              eos_id: int, pad_id: int) -> torch.Tensor:
    where = parallel.device()
    rows, width = prompts.shape
    stages = _Stages(model)
    cache = StaticInferenceContext(rows, width + steps)
    hidden_keys = torch.zeros(rows, 1, 1, width + steps, dtype=torch.bool, device=where)
    hidden_keys[:, 0, 0, :width] = ~prompt_mask.to(where)
    padded = bool(hidden_keys.any())
    responses = torch.full((rows, steps), pad_id, device=where)
    ended = torch.zeros(rows, dtype=torch.bool, device=where)
    inputs, seen = prompts.to(where), 0
    for step in range(steps):
        seen += inputs.size(1)
        logits = stages.forward(inputs, hidden_keys[..., :seen] if padded else None, cache)
        cache.increment_sequence_len_offset(inputs.size(1))
        cache.enable_decode_mode()
        token = stages.agree(choose(logits.float(), step) if parallel.last_stage() else None, rows)
        token = torch.where(ended, pad_id, token)
        responses[:, step] = token
        ended |= token == eos_id
        if bool(ended.all()):
            break
        inputs = token[:, None]
    return responses


class _Stages:
    """A forward pass through the pipeline, one message a stage, and the chosen token back to all."""

    def __init__(self, model: LanguageModel | Interleaved):
        self.model = model
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()
        self.tensor = parallel_state.get_tensor_model_parallel_group()
        self.messages = P2PCommunicator(self.pipeline, model.config) if self.pipeline.size() > 1 else None

    def forward(self, tokens: torch.Tensor, hidden_keys: torch.Tensor | None, cache: StaticInferenceContext) -> torch.Tensor | None:
        """Logits (B, V padded) of the last position, gathered over tensor-parallel ranks; None before the last stage."""
        for part in parts(self.model):  # of an interleaved pipeline the last stage's messages go on to the first stage's next part
            if self.messages:
                shape = (tokens.size(1), tokens.size(0), self.model.config.hidden_size)
                part.set_input_tensor(self.messages.recv_forward(shape, part.pre_process))
            output = part(tokens, hidden_keys, inference_context=cache)
            if self.messages:
                self.messages.send_forward(output, part.post_process)
        if not parallel.last_stage():
            return None
        logits = output[:, -1].contiguous()
        columns = [torch.empty_like(logits) for _ in range(self.tensor.size())]
        dist.all_gather(columns, logits, group=self.tensor)
        return torch.cat(columns, -1)

    def agree(self, token: torch.Tensor | None, rows: int) -> torch.Tensor:
        """The last stage's choice on all ranks. Also within a stage: sums on a GPU have no fixed order."""
        if token is None:
            token = torch.empty(rows, dtype=torch.long, device=parallel.device())
        elif self.tensor.size() > 1:
            dist.broadcast(token, parallel_state.get_tensor_model_parallel_src_rank(), group=self.tensor)
        return parallel.from_last_stage(token)
