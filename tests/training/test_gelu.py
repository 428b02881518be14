"""GELU with a bias and a backward pass of its own, against autograd through torch's GELU."""

import os

import pytest
import torch
import torch.nn.functional as F

from training.model.gelu import gelu


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
    for found, exact in zip(gradients(gelu, *given), gradients(lambda x, bias: F.gelu(x + bias, approximate="tanh"), *given), strict=True):
        assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="a GPU, or TRITON_INTERPRET=1")
@pytest.mark.parametrize(("rows", "columns"), [(300, 520), (17, 30)])
def test_the_kernel(rows, columns):
    """Rows and columns that fill no tile; far inputs, where the exponential overflows."""
    from training.model import gelu_triton

    torch.manual_seed(0)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, grad, bias = torch.randn(rows, columns) * 3, torch.randn(rows, columns), torch.randn(columns)
    inputs[:2] *= 1e4
    found = gelu_triton.backward(grad.to(where), inputs.to(where), bias.to(where))
    exact = [inputs.double().requires_grad_(), bias.double().requires_grad_()]
    F.gelu(exact[0] + exact[1], approximate="tanh").backward(grad.double())
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine.cpu().double() - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()
