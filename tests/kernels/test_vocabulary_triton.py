"""The kernels between the head's matrix products against plain torch in double precision."""

import pytest
import torch

from tests.kernels.where import DEVICE
from training.models import chunked_logprobs, chunked_logprobs_triton

ROWS = 37
"""More than chunked_logprobs.FIRST_ROWS twice: a bf16 gradient is written over fp32 logits in three parts."""


def logits_and_targets(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits up to 40; some targets are on other ranks, below this rank's columns and
    above."""
    generator = torch.Generator().manual_seed(columns)
    target = torch.randint(0, columns, (ROWS,), generator=generator)
    target[1], target[2], target[3], target[4] = -5, columns, 0, columns - 1
    return (torch.randn(ROWS, columns, generator=generator) * 10).to(DEVICE), target.to(DEVICE)


@pytest.mark.parametrize("columns", [31, 8192, 9001], ids=["a part of a block", "one block", "two blocks"])
@pytest.mark.parametrize("entropy", [True, False])
def test_the_sums_over_a_row(columns, entropy):
    logits, target = logits_and_targets(columns)
    highest, total, weighted, chosen = chunked_logprobs_triton.statistics(logits, target, 0.7, entropy)
    z = logits.double() / 0.7
    shifted = z - z.amax(1, keepdim=True)
    inside = (target >= 0) & (target < columns)
    assert torch.allclose(highest.double(), z.amax(1), rtol=1e-6)
    assert torch.allclose(total.double(), shifted.exp().sum(1), rtol=1e-5)
    expected = (shifted.exp() * shifted).sum(1) if entropy else torch.zeros_like(total)
    assert torch.allclose(weighted.double(), expected.double(), rtol=1e-5, atol=1e-5)
    read = z.gather(1, target.clamp(0, columns - 1)[:, None]).squeeze(1)
    assert torch.allclose(chosen.double(), torch.where(inside, read, 0.0), rtol=1e-6)


@pytest.mark.parametrize("columns", [31, 4096, 5001])
@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_logits(columns, entropy, dtype):
    logits, target = logits_and_targets(columns)
    of_logprob, of_entropy = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wide = logits.double().requires_grad_()
    log_p = (wide / 0.7).log_softmax(1)
    inside = (target >= 0) & (target < columns)
    chosen = log_p.gather(1, target.clamp(0, columns - 1)[:, None]).squeeze(1)
    lse = (wide / 0.7).logsumexp(1)
    entropies = -(log_p.exp() * log_p).sum(1)
    loss = (of_logprob * torch.where(inside, chosen, -lse)).sum() + (of_entropy * entropies).sum() * entropy
    exact = torch.autograd.grad(loss, wide)[0]
    given = target, lse.float().detach(), entropies.float().detach(), of_logprob, of_entropy if entropy else None
    into = torch.empty_like(logits, dtype=dtype)
    chunked_logprobs_triton.to_gradient(logits, *given, 0.7, into)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    assert (into.double() - exact).norm() <= bound * exact.norm()
    assert (chunked_logprobs.gradient_of(logits, *given, 0.7, dtype).double() - exact).norm() <= bound * exact.norm()
