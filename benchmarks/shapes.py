"""The models that benchmarks run, all of BLOOM's family, and what a token costs in them. Standard
library only."""

from __future__ import annotations

from training.config.shape import Shape
from training.models.bloom.table import shape as bloom

VOCAB = 250880
SHAPES = {
    "560m": bloom(24, 1024, 16, VOCAB, 1e-5),
    "1b7": bloom(24, 2048, 16, VOCAB, 1e-5),
    "3b": bloom(30, 2560, 32, VOCAB, 1e-5),
    "7b1": bloom(30, 4096, 32, VOCAB, 1e-5),
    "176b": bloom(70, 14336, 112, VOCAB, 1e-5),
    "small": bloom(2, 64, 4, 1000, 1e-5),
    "tiny": bloom(8, 64, 8, 1000, 1e-5),
}
"""The published sizes, and two to try a script with: "small" for one process, "tiny" for layouts of
up to 8 ranks."""
TINY_ON_GPU = bloom(8, 512, 8, 1000, 1e-5)
"""Heads of 64, the fewest dimensions that GPUs were tried with."""
PEAK_FLOPS = 989e12
"""FLOP/s in bf16 of the H100 and the H200."""


def flops_per_token(shape: Shape, length: int, head: bool = True) -> float:
    """FLOPs of a token in forward and backward: 6 (12 h^2 L + V h) + 6 L h s. The forward pass
    alone takes a third. Causal attention reads half of the square, so ``length`` counts half."""
    weights = 12 * shape.hidden**2 * shape.layers + (shape.vocab * shape.hidden if head else 0)
    return 6 * weights + 6 * shape.layers * shape.hidden * length
