"""GELU's backward kernel against autograd in double precision."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.where import DEVICE
from training.models import gelu_triton


@pytest.mark.parametrize(("rows", "columns"), [(300, 520), (17, 30)])
def test_the_kernel(rows, columns):
    """Rows and columns that fill no tile; far inputs, where the exponential overflows."""
    torch.manual_seed(0)
    inputs, grad, bias = torch.randn(rows, columns) * 3, torch.randn(rows, columns), torch.randn(columns)
    inputs[:2] *= 1e4
    result = gelu_triton.backward(grad.to(DEVICE), inputs.to(DEVICE), bias.to(DEVICE))
    exact = [inputs.double().requires_grad_(), bias.double().requires_grad_()]
    F.gelu(exact[0] + exact[1], approximate="tanh").backward(grad.double())
    for ours, theirs in zip(result, exact, strict=True):
        assert (ours.cpu().double() - theirs.grad).norm() <= 1e-6 * theirs.grad.norm()
