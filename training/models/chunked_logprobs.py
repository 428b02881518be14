"""Log-probabilities over a large vocabulary, made from hidden states in chunks of tokens, the
columns split over ranks.

The logits of 8,192 tokens of BLOOM (250,880 columns) are 8 GB, so they never exist together: a
chunk's are made, read and dropped. With z the logits divided by the temperature, p = softmax(z), y
the token:

    log p(y) = z_y - lse(z)          d log p(y) / dz = onehot(y) - p
    H = lse(z) - sum_j p_j z_j       dH / dz_j = -p_j (log p_j + H)

Logits are fp32, also of bf16 hidden states and weights, as in the rollout engine: a bf16 logit of
16 to 32 is rounded to 1/8. Their gradient is of the weights' type, as the products that read it.

Matrix products are the device's own. What lies between them is one pass over the logits forward and
one backward (training.models.chunked_logprobs_triton on CUDA, plain torch here). Where the weight
has a buffer for its gradient (training.models.linear), the gradient is added there and none is
returned.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.config.shape import CHUNK_LOGITS
from training.models.linear import add_product, buffer

NOTHING = torch.finfo(torch.float32).min / 2
"""Largest logit of a rank that holds only padding of the vocabulary: finite, so that its weight of
0 gives no NaN."""
FIRST = 16
"""Rows of a narrower gradient that are not written over the logits at once. A multiple of 4: slices
stay aligned to 16 bytes."""


@dataclass(frozen=True)
class Columns:
    """This rank's columns of the vocabulary."""

    first: int
    """Token of its first column."""
    real: int
    """Columns before the vocabulary's padding, which takes part in nothing; may be 0."""
    group: dist.ProcessGroup
    """The tensor-parallel ranks, which have the other columns."""


@dataclass(frozen=True)
class Positions:
    """Which hidden states (M, H) are read, and the token that each predicts."""

    index: torch.Tensor
    """(N,) int64, rows of the hidden states."""
    target: torch.Tensor
    """(N,) int64, tokens."""


def chunks(count: int, columns: int) -> list[slice]:
    """``count`` rows in equal parts of at most CHUNK_LOGITS logits each (one row at least)."""
    most = max(CHUNK_LOGITS // columns, 1)
    size = -(-count // max(-(-count // most), 1))
    return [slice(start, min(start + size, count)) for start in range(0, count, max(size, 1))]


def product(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) = hidden (N, H) weight (V, H)^T, in fp32 where the operands are narrower."""
    if hidden.dtype.itemsize >= 4:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.float().t()  # products of bf16 numbers are exact in fp32


def _on_gpu():
    from training.models import chunked_logprobs_triton

    return chunked_logprobs_triton


def _statistics(logits, target, temperature: float, entropy: bool):
    """Of (n, C) logits: the largest z, sum exp(z - largest), the sum of exp(z - largest)(z -
    largest) where ``entropy``, else 0, and z of the target (n,) counted from this rank's first
    column, 0 where it has none; (n,) fp32 each."""
    if logits.is_cuda:
        return _on_gpu().statistics(logits, target, temperature, entropy)
    z = logits.float() / temperature
    highest = z.amax(-1)
    shifted = z - highest[:, None]
    exponentials = shifted.exp()
    here = (target >= 0) & (target < logits.size(1))
    chosen = logits.gather(-1, torch.where(here, target, 0)[:, None]).squeeze(-1).float() / temperature
    weighted = (exponentials * shifted).sum(-1) if entropy else torch.zeros_like(highest)
    return highest, exponentials.sum(-1), weighted, torch.where(here, chosen, 0.0)


def gradient_of(logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, dtype) -> torch.Tensor:
    """The gradient by (n, C) logits of sum(grad_logprob log p(y) + grad_entropy H), of type
    ``dtype``; (n,) each but the first.

    It takes the logits' place, also where it is half as wide: rows [k, 2 k) of it then lie where
    rows [k / 2, k) of the logits were, which have been read. Only the first rows need room of their
    own.
    """
    if logits.dtype == dtype:
        result, edges = logits, [0, logits.size(0)]
    else:
        result = logits.view(dtype).view(-1)[: logits.numel()].view(logits.shape)
        doubled = (FIRST << bit for bit in itertools.count())
        edges = [0, *itertools.takewhile(lambda row: row < logits.size(0), doubled), logits.size(0)]
    for rows in map(slice, edges, edges[1:]):
        given = [
            None if values is None else values[rows] for values in (target, lse, entropy, grad_logprob, grad_entropy)
        ]
        room = result[rows] if rows.start or result is logits else torch.empty_like(result[rows])
        _to_gradient(logits[rows], *given, temperature, room)
        if not rows.start and result is not logits:
            result[rows] = room
    return result


def _to_gradient(
    logits, target, lse, entropy, grad_logprob, grad_entropy, temperature: float, into: torch.Tensor
) -> None:
    """Write ``gradient_of`` of some rows into ``into`` (n, C), which may be the logits
    themselves."""
    if logits.is_cuda:
        return _on_gpu().to_gradient(logits, target, lse, entropy, grad_logprob, grad_entropy, temperature, into)
    log_p = logits.float() / temperature - lse[:, None]
    p = log_p.exp()
    one_hot = torch.arange(logits.size(1), device=logits.device)[None] == target[:, None]
    gradient = grad_logprob[:, None] * (one_hot.float() - p)
    if grad_entropy is not None:
        gradient = gradient - grad_entropy[:, None] * p * (log_p + entropy[:, None])
    into.copy_(gradient / temperature)
    return None


def _reduce(parts: list, columns: Columns):
    """The ranks' and chunks' statistics -> log p(y), lse(z), entropy (N,); two all-reduces."""
    highest, total, weighted, chosen = (torch.cat(values) for values in zip(*parts, strict=True))
    if columns.group.size() > 1:
        largest = highest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, columns.group)
        below = highest - largest
        sums = torch.stack((total * below.exp(), (weighted + total * below) * below.exp(), chosen))
        dist.all_reduce(sums, group=columns.group)
        highest, (total, weighted, chosen) = largest, sums
    lse = highest + total.log()
    return chosen - lse, lse, total.log() - weighted / total


class _Chunks:
    """The matrix products and passes over one chunk's logits."""

    def __init__(self, hidden, weight, positions: Positions, columns: Columns, temperature: float):
        self.hidden, self.weight = hidden, weight[: columns.real]
        self.index, self.target = positions.index, positions.target - columns.first
        self.temperature = temperature
        # with padding: the ranks reduce alike
        self.slices = chunks(positions.index.numel(), weight.size(0))

    def logits(self, part: slice) -> torch.Tensor:
        return product(self.hidden[self.index[part]], self.weight)

    def statistics(self, logits: torch.Tensor, part: slice, entropy: bool):
        if not logits.size(1):
            nothing = torch.zeros(logits.size(0), device=logits.device)
            return nothing + NOTHING, nothing, nothing, nothing
        return _statistics(logits, self.target[part], self.temperature, entropy)

    def gradients(self, part: slice, logits, lse, entropy, grad_logprob, grad_entropy, into) -> None:
        """Add the chunk's gradients to ``into``: (of the hidden states, of this rank's real rows of
        the weight), None = not wanted. ``logits`` are overwritten; the other arguments are the
        chunk's."""
        if not logits.size(1):
            return
        gradient = gradient_of(
            logits, self.target[part], lse, entropy, grad_logprob, grad_entropy, self.temperature, self.weight.dtype
        )
        of_hidden, of_weight = into
        index = self.index[part]
        if of_hidden is not None:
            of_hidden[index] = gradient @ self.weight
        if of_weight is not None:
            add_product(of_weight, gradient, self.hidden[index])


def _zeros(ctx, hidden, weight, sums: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Where the gradients of (hidden states, weight) are gathered; None where it is not asked for,
    or goes to the buffer ``sums``."""
    asked = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and sums is None
    return [
        torch.zeros_like(tensor) if wanted else None for tensor, wanted in zip((hidden, weight), asked, strict=True)
    ]


class _LogProbs(torch.autograd.Function):
    """(log p(y), H) with any upstream gradient; backward makes each chunk's logits again, or has
    kept them where there is one chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, positions, columns, temperature, entropy):
        work = _Chunks(hidden, weight, positions, columns, temperature)
        parts, logits = [], None
        for part in work.slices:
            logits = None  # frees the last chunk's before the next is made
            logits = work.logits(part)
            parts.append(work.statistics(logits, part, entropy))
        logprobs, lse, entropies = _reduce(parts, columns)
        ctx.save_for_backward(hidden, weight, positions.index, positions.target, lse, entropies)
        ctx.columns, ctx.temperature, ctx.entropy = columns, temperature, entropy
        ctx.kept = logits if len(work.slices) == 1 and any(ctx.needs_input_grad) else None
        return logprobs, entropies

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropies):
        hidden, weight, index, target, lse, entropies = ctx.saved_tensors
        work = _Chunks(hidden, weight, Positions(index, target), ctx.columns, ctx.temperature)
        sums = buffer(weight) if ctx.needs_input_grad[1] else None
        of_hidden, of_weight = _zeros(ctx, hidden, weight, sums)
        into = of_hidden, _real(of_weight if sums is None else sums, ctx.columns)
        for part in work.slices:
            logits, ctx.kept = work.logits(part) if ctx.kept is None else ctx.kept, None
            work.gradients(
                part,
                logits,
                lse[part],
                entropies[part],
                grad_logprobs[part].contiguous(),
                grad_entropies[part].contiguous() if ctx.entropy else None,
                into,
            )
            del logits
        return of_hidden, of_weight, None, None, None, None


class _NegativeLogLikelihood(torch.autograd.Function):
    """-sum log p(y). The forward pass computes the gradients, while a chunk's logits are there.

    It adds the weight's gradient to its buffer at once, for an upstream gradient of 1. Without a
    buffer the backward pass scales the gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, positions, columns):
        work = _Chunks(hidden, weight, positions, columns, 1.0)
        sums = buffer(weight) if ctx.needs_input_grad[1] else None
        of_hidden, of_weight = _zeros(ctx, hidden, weight, sums)
        into = of_hidden, _real(of_weight if sums is None else sums, columns)
        loss = torch.zeros((), device=hidden.device)
        for part in work.slices:
            logits = work.logits(part)
            logprobs, lse, _ = _reduce([work.statistics(logits, part, False)], columns)
            loss = loss - logprobs.sum()
            work.gradients(part, logits, lse, None, torch.full_like(lse, -1.0), None, into)
            del logits
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.added = sums is not None
        return loss

    @staticmethod
    def backward(ctx, grad):
        # on a GPU the host would wait for it
        if ctx.added and not grad.is_cuda and grad.item() != 1:
            raise ValueError(
                f"next_token_nll: upstream gradient {grad.item():g}, but the output matrix's gradient was added for 1"
            )
        # In place: these are this function's own, and a graph is walked once.
        of_hidden, of_weight = ctx.saved_tensors
        return *(None if made is None else made.mul_(grad) for made in (of_hidden, of_weight)), None, None


def _real(of_weight: torch.Tensor | None, columns: Columns) -> torch.Tensor | None:
    return None if of_weight is None else of_weight[: columns.real]


def logprobs_and_entropy(hidden, weight, positions: Positions, columns: Columns, temperature: float, entropy: bool):
    """log p(target) and, where ``entropy``, the distributions' entropies in nats (else
    meaningless), (N,) fp32, differentiable.

    ``hidden`` (M, H), ``weight`` (V / tp, H). Every rank's gradient of ``hidden`` is its columns'
    part: the sum over ranks is the whole.
    """
    if not positions.index.numel():
        nothing = hidden[:0].float().sum(1) + weight[:0].float().sum(1)
        return nothing, nothing
    return _LogProbs.apply(hidden, weight, positions, columns, temperature, entropy)


def negative_log_likelihood(hidden, weight, positions: Positions, columns: Columns) -> torch.Tensor:
    """-sum of log p(target), fp32 (); arguments and gradients as in ``logprobs_and_entropy``.

    Differentiable once; where the weight has a buffer, by an upstream gradient of 1.
    """
    return _NegativeLogLikelihood.apply(hidden, weight, positions, columns)
