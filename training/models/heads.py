"""Output heads: a scalar head, and log-probabilities from a language model's head.

Log-probabilities take 4 C V bytes. V is the number of a rank's vocabulary columns. C is the smaller
of the rank's predictions and the chunk of training.models.chunked_logprobs (2,139 tokens at BLOOM's
vocabulary without tensor parallelism). The weight's gradient goes into its buffer. Only (B, T)
numbers grow with the micro-batch. The head does not compute tokens that a mask leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel

from training.models.chunked_logprobs import Columns, Positions, logprobs_and_entropy, negative_log_likelihood, product


class ScalarHead(torch.nn.Module):
    """One number per token: hidden (T, B, H) -> (B, T) fp32. Replicated over tensor-parallel ranks.

    Weights are initialised N(0, 1/sqrt(H + 1)), the bias 0 (Stiennon et al. 2020). Hugging Face's
    head has no ``bias`` (Shape.score_bias).
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
        # fp32, because bf16 would give close replies equal scores: near 1 its spacing is 1/128.
        bias = None if self.linear.bias is None else self.linear.bias.float()
        scores = torch.nn.functional.linear(hidden.float(), self.linear.weight.float(), bias).squeeze(-1)
        if self.sequence_parallel:
            scores = tensor_parallel.gather_from_sequence_parallel_region(
                scores, tensor_parallel_output_grad=False, group=self.group
            )
        return scores.transpose(0, 1)


@dataclass(frozen=True)
class Output:
    """Output of a language model's last stage. Losses read it only by the functions below."""

    hidden: torch.Tensor
    """(T, B, H) after the last layer norm; under sequence parallelism this rank's part (T / tp, B,
    H)."""
    weight: torch.Tensor
    """The output matrix's rows of this rank (V / tp, H)."""
    columns: Columns
    sequence_parallel: bool

    def full_hidden(self) -> torch.Tensor:
        """Return the hidden states (T, B, H) of all tokens on each tensor-parallel rank.

        Their gradients are summed over the ranks.
        """
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(self.hidden, group=self.columns.group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(self.hidden, group=self.columns.group)

    def logits(self) -> torch.Tensor:
        """Return all logits (B, T, V / tp) fp32, -inf in the columns of vocabulary padding.

        They are for comparing models; for a loss they are too large.
        """
        hidden = self.full_hidden()
        rows = product(hidden.flatten(0, 1), self.weight[: self.columns.real])
        logits = rows.unflatten(0, hidden.shape[:2]).transpose(0, 1)
        return torch.nn.functional.pad(logits, (0, self.weight.size(0) - self.columns.real), value=float("-inf"))


def _read(output: Output, tokens: torch.Tensor, mask: torch.Tensor | None):
    """Return the hidden states (T * B, H), the positions that predict tokens (where ``mask``), and
    the predicted tokens' indices in (B, T)."""
    length, rows = tokens.size(1), tokens.size(0)
    if mask is None:
        place = torch.arange(rows * (length - 1), device=tokens.device)
        row, t = place % rows, place // rows + 1
    else:
        row, t = mask[:, 1:].nonzero(as_tuple=True)
        t = t + 1
    return output.full_hidden().flatten(0, 1), Positions((t - 1) * rows + row, tokens[row, t]), (row, t)


def next_token_logprobs(
    output: Output, tokens: torch.Tensor, temperature: float = 1.0, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return log-probabilities (B, T) fp32, aligned with ``tokens`` (B, T).

    At t stands that of token t given those before it; 0 at t = 0 and where ``mask`` (B, T) is
    False. The values are equal on all tensor-parallel ranks. They are differentiable: the backward
    pass computes the logits of each chunk again, a third more of the head's matrix products, unless
    one chunk holds all.
    """
    hidden, positions, place = _read(output, tokens, mask)
    logprobs, _ = logprobs_and_entropy(hidden, output.weight, positions, output.columns, temperature, False)
    return _placed(tokens, place, logprobs)


def next_token_logprobs_and_entropy(
    output: Output, tokens: torch.Tensor, temperature: float = 1.0, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``next_token_logprobs``, and the entropy (B, T) fp32 in nats of the distribution that
    token t was drawn from.

    Both are differentiable. The entropy costs one more sum over the logits.
    """
    hidden, positions, place = _read(output, tokens, mask)
    logprobs, entropy = logprobs_and_entropy(hidden, output.weight, positions, output.columns, temperature, True)
    return _placed(tokens, place, logprobs), _placed(tokens, place, entropy)


def next_token_nll(output: Output, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return minus the sum of ``next_token_logprobs`` where ``mask``, fp32 ().

    It is for a loss that weighs all tokens alike. The forward pass computes the gradients, so that
    no logits are computed twice. It stores the hidden states' gradient for the backward pass. It
    adds the weight's gradient to its buffer at once, for an upstream gradient of 1; without a
    buffer it stores this one, too.
    """
    hidden, positions, _ = _read(output, tokens, mask)
    if not torch.is_grad_enabled():
        return -logprobs_and_entropy(hidden, output.weight, positions, output.columns, 1.0, False)[0].sum()
    return negative_log_likelihood(hidden, output.weight, positions, output.columns)


def _placed(tokens: torch.Tensor, place: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tokens.shape, device=tokens.device).index_put(place, values)


def read_last(values: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the head's ``values`` (B, T) at each row's last real token: (B,)."""
    return values.gather(1, batch["lengths"][:, None] - 1).squeeze(1)
