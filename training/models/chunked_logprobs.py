"""Log-probabilities over a large vocabulary, computed from hidden states in chunks of tokens. The
vocabulary's columns are split over tensor-parallel ranks.

The logits of 8,192 tokens of BLOOM (250,880 columns) are 8 GB, so they never exist all at once:
those of a chunk are computed, read and freed. With z the logits divided by the temperature, p =
softmax(z), y the token:

    log p(y) = z_y - lse(z)          d log p(y) / dz = onehot(y) - p
    H = lse(z) - sum_j p_j z_j       dH / dz_j = -p_j (log p_j + H)

Logits are fp32, also those of bf16 hidden states and weights, as in the rollout engine: a bf16
logit of 16 to 32 is rounded to 1/8. Their gradient has the weights' type, because the matrix
products read it in that type.

Between the matrix products there is one pass over the logits forward and one backward. On CUDA they
are Triton kernels (training.models.chunked_logprobs_triton), here plain torch. Where the weight has
a buffer for its gradient (training.models.linear), the gradient is added there and none is
returned.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.config.shape import CHUNK_LOGITS
from training.models.linear import add_product, buffer

PADDING_LOGIT = torch.finfo(torch.float32).min / 2
"""Largest logit of a rank that has only vocabulary padding. It is finite, so that its weight of 0
gives no NaN."""
FIRST_ROWS = 16
"""First rows of a narrower gradient, which need memory of their own. A multiple of 4: slices stay
aligned to 16 bytes."""


@dataclass(frozen=True)
class Columns:
    """This rank's columns of the vocabulary."""

    first: int
    """Token of this rank's first column."""
    real: int
    """Number of columns before the vocabulary's padding; may be 0. Padding is never read."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks, which share the columns."""


@dataclass(frozen=True)
class Positions:
    """Which hidden states (M, H) are read, and the token that each predicts."""

    index: torch.Tensor
    """(N,) int64, rows of the hidden states."""
    target: torch.Tensor
    """(N,) int64, tokens."""


def chunks(count: int, columns: int) -> list[slice]:
    """Split ``count`` rows evenly into slices of at most CHUNK_LOGITS logits (one row at least)."""
    max_rows = max(CHUNK_LOGITS // columns, 1)
    size = -(-count // max(-(-count // max_rows), 1))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return logits (N, V) = hidden (N, H) weight (V, H)^T, fp32 where operands are narrower."""
    if hidden.dtype.itemsize >= 4:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()  # products of bf16 numbers are exact in fp32


def _on_gpu():
    from training.models import chunked_logprobs_triton

    return chunked_logprobs_triton


def _statistics(logits, target, temperature: float, entropy: bool):
    """Return four statistics (n,) fp32 of (n, C) logits.

    They are the largest z; the sum of exp(z - largest); the sum of exp(z - largest)(z - largest), 0
    without ``entropy``; and z of the ``target``, 0 where this rank lacks its column. Targets (n,)
    count from this rank's first column.
    """
    if logits.is_cuda:
        return _on_gpu().statistics(logits, target, temperature, entropy)
    z = logits.float() / temperature
    largest = z.amax(-1)
    shifted = z - largest[:, None]
    exponentials = shifted.exp()
    is_local = (target >= 0) & (target < logits.size(1))
    target_z = logits.gather(-1, torch.where(is_local, target, 0)[:, None]).squeeze(-1).float() / temperature
    weighted = (exponentials * shifted).sum(-1) if entropy else torch.zeros_like(largest)
    return largest, exponentials.sum(-1), weighted, torch.where(is_local, target_z, 0.0)


def gradient_of(logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, dtype) -> torch.Tensor:
    """Return the gradient of sum(grad_logprob log p(y) + grad_entropy H) by ``logits`` (n, C), of
    type ``dtype``. All other arguments are (n,).

    The gradient overwrites the logits, also where it is half as wide: its rows [k, 2 k) then lie
    where the logits' rows [k / 2, k) were, which have been read. Only the first rows need memory of
    their own.
    """
    if logits.dtype == dtype:
        result, edges = logits, [0, logits.size(0)]
    else:
        result = logits.view(dtype).view(-1)[: logits.numel()].view(logits.shape)
        doubled = (FIRST_ROWS << bit for bit in itertools.count())
        edges = [0, *itertools.takewhile(lambda row: row < logits.size(0), doubled), logits.size(0)]
    for rows in map(slice, edges, edges[1:]):
        arguments = [
            None if values is None else values[rows] for values in (target, lse, entropy, grad_logprob, grad_entropy)
        ]
        output = result[rows] if rows.start or result is logits else torch.empty_like(result[rows])
        _to_gradient(logits[rows], *arguments, temperature, output)
        if not rows.start and result is not logits:
            result[rows] = output
    return result


def _to_gradient(
    logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, output: torch.Tensor
) -> None:
    """Write ``gradient_of`` of some rows to ``output`` (n, C), which may be the logits
    themselves."""
    if logits.is_cuda:
        return _on_gpu().to_gradient(logits, target, lse, entropy, grad_logprob, grad_entropy, temperature, output)
    log_p = logits.float() / temperature - lse[:, None]
    p = log_p.exp()
    one_hot = torch.arange(logits.size(1), device=logits.device)[None] == target[:, None]
    gradient = grad_logprob[:, None] * (one_hot.float() - p)
    if grad_entropy is not None:
        gradient = gradient - grad_entropy[:, None] * p * (log_p + entropy[:, None])
    output.copy_(gradient / temperature)
    return None


def _reduce(statistics: list, columns: Columns):
    """Combine the chunks' and the ranks' statistics into log p(y), lse(z) and entropy (N,), by two
    all-reduces."""
    largest, total, weighted, target_z = (torch.cat(values) for values in zip(*statistics, strict=True))
    if columns.group.size() > 1:
        local_largest, largest = largest, largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, columns.group)
        below = local_largest - largest
        sums = torch.stack((total * below.exp(), (weighted + total * below) * below.exp(), target_z))
        dist.all_reduce(sums, group=columns.group)
        total, weighted, target_z = sums
    lse = largest + total.log()
    return target_z - lse, lse, total.log() - weighted / total


class _Chunks:
    """The matrix products and passes over one chunk's logits."""

    def __init__(self, hidden, weight, positions: Positions, columns: Columns, temperature: float):
        self.hidden, self.weight = hidden, weight[: columns.real]
        self.index, self.target = positions.index, positions.target - columns.first
        self.temperature = temperature
        # counted with padding: all ranks must have the same chunks
        self.slices = chunks(positions.index.numel(), weight.size(0))

    def logits(self, chunk: slice) -> torch.Tensor:
        return product(self.hidden[self.index[chunk]], self.weight)

    def statistics(self, logits: torch.Tensor, chunk: slice, entropy: bool):
        if not logits.size(1):
            zeros = torch.zeros(logits.size(0), device=logits.device)
            return zeros + PADDING_LOGIT, zeros, zeros, zeros
        return _statistics(logits, self.target[chunk], self.temperature, entropy)

    def add_gradients(self, chunk: slice, logits, lse, entropy, grad_logprob, grad_entropy, sums) -> None:
        """Add the chunk's gradients to ``sums``: (of the hidden states, of this rank's real rows of
        the weight), None for one that is not needed.

        ``logits`` are overwritten. The other arguments are the chunk's.
        """
        if not logits.size(1):
            return
        gradient = gradient_of(
            logits, self.target[chunk], lse, entropy, grad_logprob, grad_entropy, self.temperature, self.weight.dtype
        )
        of_hidden, of_weight = sums
        index = self.index[chunk]
        if of_hidden is not None:
            of_hidden[index] = gradient @ self.weight
        if of_weight is not None:
            add_product(of_weight, gradient, self.hidden[index])


def _gradient_sums(ctx, hidden, weight, columns: Columns):
    """Return where the gradients of (hidden states, weight) are summed, None for one that is not
    needed.

    The third value is the weight's gradient as the sums go into it, without the rows of padding.
    The weight's sum is its buffer where it has one; the second value is then None, because autograd
    must get none.
    """
    of_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return of_hidden, None, None
    accumulated = buffer(weight)
    if accumulated is not None:
        return of_hidden, None, accumulated[: columns.real]
    of_weight = torch.zeros_like(weight)
    return of_hidden, of_weight, of_weight[: columns.real]


class _LogProbs(torch.autograd.Function):
    """(log p(y), H) with any upstream gradient. The backward pass computes each chunk's logits
    again; one chunk's are saved."""

    @staticmethod
    def forward(ctx, hidden, weight, positions, columns, temperature, entropy):
        work = _Chunks(hidden, weight, positions, columns, temperature)
        statistics, logits = [], None
        for chunk in work.slices:
            logits = None  # frees the last chunk's before the next are computed
            logits = work.logits(chunk)
            statistics.append(work.statistics(logits, chunk, entropy))
        logprobs, lse, entropies = _reduce(statistics, columns)
        ctx.save_for_backward(hidden, weight, positions.index, positions.target, lse, entropies)
        ctx.columns, ctx.temperature, ctx.entropy = columns, temperature, entropy
        ctx.logits = logits if len(work.slices) == 1 and any(ctx.needs_input_grad) else None
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, index, target, lse, entropies = ctx.saved_tensors
        work = _Chunks(hidden, weight, Positions(index, target), ctx.columns, ctx.temperature)
        of_hidden, of_weight, weight_sum = _gradient_sums(ctx, hidden, weight, ctx.columns)
        for chunk in work.slices:
            logits, ctx.logits = work.logits(chunk) if ctx.logits is None else ctx.logits, None
            work.add_gradients(
                chunk,
                logits,
                lse[chunk],
                entropies[chunk],
                grad_logprobs[chunk].contiguous(),
                grad_entropies[chunk].contiguous() if ctx.entropy else None,
                (of_hidden, weight_sum),
            )
            del logits
        return of_hidden, of_weight, None, None, None, None


class _NegativeLogLikelihood(torch.autograd.Function):
    """-sum log p(y). The forward pass computes the gradients while a chunk's logits exist.

    It adds the weight's gradient to its buffer at once, for an upstream gradient of 1. Without a
    buffer the backward pass scales the gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, positions, columns):
        work = _Chunks(hidden, weight, positions, columns, 1.0)
        of_hidden, of_weight, weight_sum = _gradient_sums(ctx, hidden, weight, columns)
        loss = torch.zeros((), device=hidden.device)
        for chunk in work.slices:
            logits = work.logits(chunk)
            logprobs, lse, _ = _reduce([work.statistics(logits, chunk, False)], columns)
            loss = loss - logprobs.sum()
            work.add_gradients(chunk, logits, lse, None, torch.full_like(lse, -1.0), None, (of_hidden, weight_sum))
            del logits
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.in_buffer = weight_sum is not None and of_weight is None
        return loss

    @staticmethod
    def backward(ctx, grad):
        # Only on the CPU: on a GPU the host would wait for the gradient.
        if ctx.in_buffer and not grad.is_cuda and grad.item() != 1:
            raise ValueError(
                f"next_token_nll: upstream gradient {grad.item():g}, but the output matrix's gradient was added for 1"
            )
        # In place: the tensors belong to this function, and a graph is walked once.
        gradients = (None if gradient is None else gradient.mul_(grad) for gradient in ctx.saved_tensors)
        return *gradients, None, None


def logprobs_and_entropy(hidden, weight, positions: Positions, columns: Columns, temperature: float, entropy: bool):
    """Return log p(target) and, where ``entropy``, the distributions' entropies in nats (else
    meaningless), (N,) fp32, differentiable.

    ``hidden`` is (M, H), ``weight`` (V / tp, H). Every rank's gradient of ``hidden`` is that of its
    own columns; the full gradient is the sum over ranks.
    """
    if not positions.index.numel():
        empty = hidden[:0].float().sum(1) + weight[:0].float().sum(1)
        return empty, empty
    return _LogProbs.apply(hidden, weight, positions, columns, temperature, entropy)


def negative_log_likelihood(hidden, weight, positions: Positions, columns: Columns) -> torch.Tensor:
    """Return -sum of log p(target), fp32 (); arguments and gradients as in
    ``logprobs_and_entropy``.

    Differentiable once; where the weight has a buffer, by an upstream gradient of 1.
    """
    return _NegativeLogLikelihood.apply(hidden, weight, positions, columns)
