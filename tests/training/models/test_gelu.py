"""GELU with a bias and a backward pass of its own, against autograd through torch's GELU."""

import pytest
import torch
import torch.nn.functional as F

from training.models.gelu import gelu


def gradients(function, *given):
    """(result, gradients) of given's fp64 copies."""
    wide = [tensor.double().requires_grad_() for tensor in given]
    result = function(*wide)
    weights = torch.linspace(-1, 2, result.numel(), dtype=torch.float64).view_as(result)
    return [result, *torch.autograd.grad((result * weights).sum(), wide)]


@pytest.mark.parametrize("shape", [(7, 3, 20), (5, 20)])
def test_its_gradients_are_those_of_torchs_gelu(shape):
    torch.manual_seed(0)
    given = torch.randn(shape) * 3, torch.randn(shape[-1])
    for found, exact in zip(
        gradients(gelu, *given), gradients(lambda x, bias: F.gelu(x + bias, approximate="tanh"), *given), strict=True
    ):
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)
