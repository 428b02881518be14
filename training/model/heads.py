"""What stands on top of the transformer: a scalar head, and log-probabilities from a vocabulary that is split over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel


class ScalarHead(torch.nn.Module):
    """One number a token: hidden (T, B, H) -> (B, T) fp32. Replicated over tensor-parallel ranks.

    Initialised N(0, 1/sqrt(H + 1)) with bias 0 (Stiennon et al. 2020).
    """

    def __init__(self, config, group):
        super().__init__()
        self.sequence_parallel, self.group = config.sequence_parallel, group
        self.linear = torch.nn.Linear(config.hidden_size, 1, dtype=config.params_dtype, device=torch.cuda.current_device())
        for parameter in self.linear.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        hidden = self.linear.in_features
        generator = torch.Generator().manual_seed(seed)
        self.linear.weight.copy_(torch.randn(1, hidden, generator=generator) * (hidden + 1) ** -0.5)
        self.linear.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # In fp32: bf16 would make ties of close replies, and steps of 1/128 of values near 1.
        scores = torch.nn.functional.linear(hidden.float(), self.linear.weight.float(), self.linear.bias.float()).squeeze(-1)
        if self.sequence_parallel:
            scores = tensor_parallel.gather_from_sequence_parallel_region(scores, tensor_parallel_output_grad=False, group=self.group)
        return scores.transpose(0, 1)


class _VocabParallelLogProbs(torch.autograd.Function):
    """log p(target) from logits (..., V / tp). Unlike megatron-core's cross entropy it leaves fp32 logits unchanged.

    At its worst (backward) it holds three fp32 tensors of the logits' size; launcher.memory.LOSS_BYTES counts them.
    """

    @staticmethod
    def forward(ctx, logits, target, group):
        columns = logits.size(-1)
        first = group.rank() * columns
        highest = logits.amax(-1).float()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        shifted = logits.float() - highest.unsqueeze(-1)
        here = (target >= first) & (target < first + columns)
        index = torch.where(here, target - first, 0).unsqueeze(-1)
        picked = shifted.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        exponentials = shifted.exp_()
        picked, total = _sum(torch.stack((picked, exponentials.sum(-1))), group)
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), index, here)
        ctx.dtype = logits.dtype
        return picked - total.log()

    @staticmethod
    def backward(ctx, grad):
        probabilities, index, here = ctx.saved_tensors
        grad_logits = -probabilities * grad.unsqueeze(-1)
        grad_logits.scatter_add_(-1, index, (grad * here).unsqueeze(-1))
        return grad_logits.to(ctx.dtype), None, None


def vocab_parallel_logprobs(logits: torch.Tensor, target: torch.Tensor, group) -> torch.Tensor:
    """log p(target), fp32, shape of ``target`` (...), from this rank's columns ``logits`` (..., V / tp). Differentiable."""
    return _VocabParallelLogProbs.apply(logits, target, group)


@torch.no_grad()
def vocab_parallel_entropy(logits: torch.Tensor, group) -> torch.Tensor:
    """Entropy in nats (...), fp32, of the distribution whose logits (..., V / tp) are split over ``group``."""
    highest = logits.amax(-1).float()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    shifted = logits.float() - highest.unsqueeze(-1)
    exponentials = shifted.exp()
    # Columns of vocabulary padding are -inf: they weigh nothing, and 0 * -inf must not become NaN.
    weighted = torch.where(exponentials > 0, exponentials * shifted, 0.0)
    total, weighted = _sum(torch.stack((exponentials.sum(-1), weighted.sum(-1))), group)
    return total.log() - weighted / total


def _sum(values: torch.Tensor, group) -> torch.Tensor:
    dist.all_reduce(values, group=group)
    return values


def next_token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """(B, T) fp32, aligned with ``tokens`` (B, T): at t the log-probability of token t given those before it; 0 at t = 0.

    ``logits`` (B, T, V / tp) of the same tokens are this tensor-parallel rank's columns.
    """
    logits = logits[:, :-1] if temperature == 1.0 else logits[:, :-1] / temperature
    logprobs = vocab_parallel_logprobs(logits, tokens[:, 1:], parallel_state.get_tensor_model_parallel_group())
    return torch.nn.functional.pad(logprobs, (1, 0))
