"""What stands on top of the transformer: a scalar head, and a language model's output, from which
losses read log-probabilities.

Memory of reading, C the smaller of a rank's predictions and training.models.chunked_logprobs's
chunk (2,139 at BLOOM's vocabulary without tensor parallelism), V its columns: 4 C V bytes. The
weight's gradient goes into its buffer. Nothing grows with the micro-batch but (B, T) numbers. Where
a mask leaves tokens out, the head does not compute them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel

from training.models.chunked_logprobs import Columns, Positions, logprobs_and_entropy, negative_log_likelihood, product


class ScalarHead(torch.nn.Module):
    """One number a token: hidden (T, B, H) -> (B, T) fp32. Replicated over tensor-parallel ranks.

    Initialised N(0, 1/sqrt(H + 1)) with bias 0 (Stiennon et al. 2020). Without ``bias`` it is
    Hugging Face's (Shape.score_bias).
    """

    def __init__(self, config, group, bias: bool = True):
        super().__init__()
        self.sequence_parallel, self.group = config.sequence_parallel, group
        self.linear = torch.nn.Linear(
            config.hidden_size, 1, bias=bias, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in self.linear.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        hidden = self.linear.in_features
        generator = torch.Generator().manual_seed(seed)
        self.linear.weight.copy_(torch.randn(1, hidden, generator=generator) * (hidden + 1) ** -0.5)
        if self.linear.bias is not None:
            self.linear.bias.zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # In fp32: bf16 would make ties of close replies, and steps of 1/128 of values near 1.
        bias = None if self.linear.bias is None else self.linear.bias.float()
        scores = torch.nn.functional.linear(hidden.float(), self.linear.weight.float(), bias).squeeze(-1)
        if self.sequence_parallel:
            scores = tensor_parallel.gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self.group
            )
        return scores.transpose(0, 1)


@dataclass(frozen=True)
class Output:
    """What a language model's last stage returns. Losses read it by the functions below only."""

    hidden: torch.Tensor
    """(T, B, H) after the last layer norm; under sequence parallelism this rank's part (T / tp, B,
    H)."""
    weight: torch.Tensor
    """The output matrix's rows of this rank (V / tp, H)."""
    columns: Columns
    sequence_parallel: bool

    def whole(self) -> torch.Tensor:
        """Hidden states (T, B, H) on each tensor-parallel rank; their gradients are summed over the
        ranks."""
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(self.hidden, group=self.columns.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(self.hidden, group=self.columns.group)

    def logits(self) -> torch.Tensor:
        """All logits (B, T, V / tp) fp32, columns of vocabulary padding at -inf: to compare models
        with, too large for a loss."""
        hidden = self.whole()
        logits = (
            product(hidden.flatten(0, 1), self.weight[: self.columns.real])
            .unflatten(0, hidden.shape[:2])
            .transpose(0, 1)
        )
        return torch.nn.functional.pad(logits, (0, self.weight.size(0) - self.columns.real), value=float("-inf"))


def _read(output: Output, tokens: torch.Tensor, mask: torch.Tensor | None):
    """Hidden states (T * B, H), the positions that predict tokens (where ``mask``), and the
    predicted tokens' places in (B, T)."""
    length, rows = tokens.size(1), tokens.size(0)
    if mask is None:
        place = torch.arange(rows * (length - 1), device=tokens.device)
        row, t = place % rows, place // rows + 1
    else:
        row, t = mask[:, 1:].nonzero(as_tuple=True)
        t = t + 1
    return output.whole().flatten(0, 1), Positions((t - 1) * rows + row, tokens[row, t]), (row, t)


def next_token_logprobs(
    output: Output, tokens: torch.Tensor, temperature: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, T) fp32, aligned with ``tokens`` (B, T): at t the log-probability of token t given those
    before it; 0 at t = 0 and where ``mask`` (B, T) is False. Differentiable: the backward pass
    makes the logits of each chunk again, a third more of the head's matrix products, unless all are
    one chunk. The same on every tensor-parallel rank.
    """
    hidden, positions, place = _read(output, tokens, mask)
    logprobs, _ = logprobs_and_entropy(hidden, output.weight, positions, output.columns, temperature, False)
    return _placed(tokens, place, logprobs)


def next_token_logprobs_and_entropy(
    output: Output, tokens: torch.Tensor, temperature: float = 1.0, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``next_token_logprobs``, and (B, T) fp32 the entropy in nats of the distribution that
    token t was drawn from. Both differentiable, at the cost of the first alone and one more sum
    over the logits."""
    hidden, positions, place = _read(output, tokens, mask)
    logprobs, entropy = logprobs_and_entropy(hidden, output.weight, positions, output.columns, temperature, True)
    return _placed(tokens, place, logprobs), _placed(tokens, place, entropy)


def next_token_nll(output: Output, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """-sum of ``next_token_logprobs`` where ``mask``, fp32 (): for a loss that weighs all tokens
    alike.

    The forward pass computes the gradients, so that no logits are computed twice. It keeps that of
    the hidden states for the backward pass. It adds that of the weight to its buffer at once, for
    an upstream gradient of 1; without a buffer it keeps this one, too.
    """
    hidden, positions, _ = _read(output, tokens, mask)
    if not torch.is_grad_enabled():
        return -logprobs_and_entropy(hidden, output.weight, positions, output.columns, 1.0, False)[0].sum()
    return negative_log_likelihood(hidden, output.weight, positions, output.columns)


def _placed(tokens: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tokens.shape, device=tokens.device).index_put(place, values)


def read_last(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The head's values (B, T) at each row's last real token (B,)."""
    return values.gather(1, batch["lengths"][:, None] - 1).squeeze(1)
