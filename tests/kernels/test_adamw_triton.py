"""AdamW's kernel against the same step in plain torch: the same bits, except for the last one of a
weight."""

import pytest
import torch

from tests.kernels.where import DEVICE, INTERPRETED
from training.optim import adamw


@pytest.mark.parametrize("first", [0, 2**31 - 700], ids=["a parameter's beginning", "element numbers beyond 31 bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_steps(first, dtype):
    generator, count = torch.Generator().manual_seed(0), 1500  # no multiple of the block
    start = torch.randn(count, generator=generator).to(DEVICE)
    states = []
    for _ in range(2):
        weight, remainder = start.bfloat16(), torch.zeros(count, dtype=torch.int16, device=DEVICE)
        adamw.split_(start, weight, remainder)
        states.append([weight, remainder, torch.zeros_like(weight), torch.zeros_like(weight)])
    for step in range(1, 4):
        grad = (torch.randn(count, generator=generator) * 0.1).to(DEVICE, dtype)
        rest = (
            torch.tensor(0.7, device=DEVICE),
            1e-3 / (1 - 0.9**step),
            0.9,
            0.999,
            1e-8,
            1 - 1e-4,
            (1 - 0.999**step) ** -0.5,
            adamw.mixed(adamw.mixed(step) + 5),
            first,
        )
        adamw.update_(*states[0], grad, *rest)
        adamw._on_gpu(*states[1], grad, *rest)
        plain, kernel = (adamw.joined(*state[:2]) for state in states)
        assert not torch.equal(plain, start) and torch.allclose(kernel, plain, rtol=2e-7, atol=1e-8)
        moments, squares = zip(*(state[2:] for state in states), strict=True)
        # the interpreter cuts digits off; a GPU rounds
        assert torch.allclose(*(values.float() for values in moments), rtol=2**-7)
        assert INTERPRETED or share_alike(*moments) >= 0.998
        assert share_alike(*squares) >= 0.998  # a stochastic rounding may fall to the other side
        states[1] = [values.clone() for values in states[0]]


def share_alike(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left == right).float().mean().item()
