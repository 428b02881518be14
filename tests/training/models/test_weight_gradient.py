"""Gradients that a custom op adds to a buffer which the compiler does not see: nothing may drop a
call or take two for one.

The op says that it changes no argument, so the compiler may treat two calls with equal arguments as
one. There are none: a weight is used once in a layer. These tests show, on the CPU, that a torch
still leaves the calls alone.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.support.distributed import run
from training.models import linear


def stack(inputs, weights):
    """Three linear layers, whose gradients of the inputs are partly not asked for."""
    for weight in weights:
        inputs = torch.nn.functional.gelu(linear._Linear.apply(inputs, weight, None))
    return inputs.square().sum()


def buffers(backend: str | None, recompute: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(6, 6, generator=generator)) for _ in range(3)]
    for weight in weights:
        weight.main_grad = torch.zeros(6, 6)
    linear.accumulate(torch.nn.ParameterList(weights))
    function = torch.compile(stack, backend=backend, fullgraph=True) if backend else stack
    for number in range(2):  # micro-batches, the second like the first
        inputs = torch.randn(5, 6, generator=torch.Generator().manual_seed(7)).requires_grad_(number == 1)
        (
            checkpoint(function, inputs, weights, use_reentrant=False) if recompute else function(inputs, weights)
        ).backward()
    return [weight.main_grad for weight in weights]


@pytest.mark.parametrize("recompute", [False, True])
def test_every_call_of_a_compiled_layer_adds_its_gradient(recompute):
    """``aot_eager``: the compiler's passes over the graphs, dead and equal calls removed, without a
    kernel's code."""
    expected = run(buffers, 1, 1, 1, None, False)[0]
    found = run(buffers, 1, 1, 1, "aot_eager", recompute)[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0.1 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
