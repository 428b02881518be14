"""Time of a layer of a micro-batch: the GPU's to compute it or the host's to launch it, whichever
is longer.

The measurements have their one home here: launcher/estimates/step_time.py predicts steps with them,
and trainers choose their packed rows by them. Pure; standard library only.
"""

from __future__ import annotations

from training.config.shape import Shape
from training.config.trainers import TrainerConfig

UTILISATION = {1024: 0.453, 2048: 0.553, 2560: 0.527, 4096: 0.589}
"""Share of the peak in forward and backward, by hidden size: one H200, sequence 2048, no recompute
(benchmarks/training/train.py)."""
PEAK_TFLOPS = {8: 312.0, 9: 989.0}
"""bf16 of an A100 and of an H100 or H200, by the major number of their compute capability
(datasheets)."""
LAUNCH_S = {False: 0.0029, True: 0.0047}
"""Seconds that the host takes for a layer of a micro-batch, forward and backward, however little it
computes; True: with messages of tensor parallelism. The first is of 1b7's updates at 4,096 tokens
and PP 2 on two H100 (2.1 of it backward; an H200's host took no more than 2), the second of 7b1's
steps at 2,048 tokens, TP 2 x PP 2, on four H100."""
FORWARD = {False: 1 / 4, True: 1 / 3}
"""Share of LAUNCH_S that a forward pass alone takes: at most .73 ms in the scoring of the first,
1.6 in that of 1b7 at 2,048 tokens, TP 2 x PP 2."""
OVERHEAD = 16
"""Cost of a micro-batch outside its layers, in tokens that could be computed meanwhile. A guess,
and small on purpose: among rows that are equally full, packing then takes the fewest
micro-batches."""

MORE_ROWS = 3
"""Packing tries up to this many times the fewest rows."""


def utilisation(hidden: int) -> float:
    """UTILISATION at a hidden size, interpolated linearly and constant outside the measured
    sizes."""
    sizes = sorted(UTILISATION)
    if hidden <= sizes[0] or hidden >= sizes[-1]:
        return UTILISATION[sizes[0] if hidden <= sizes[0] else sizes[-1]]
    above = next(size for size in sizes if size >= hidden)
    below = sizes[sizes.index(above) - 1]
    part = (hidden - below) / (above - below)
    return UTILISATION[below] + part * (UTILISATION[above] - UTILISATION[below])


def flops_per_token(shape: Shape, length: int) -> tuple[float, float]:
    """Forward and backward of (one layer, the head): 6 x parameters of the matrices, and attention
    over half of the square."""
    return 6 * shape.layer_multiplications + 6 * shape.attention_width * length, 6 * shape.vocab * shape.hidden


def launched_tokens(shape: Shape, tensor_parallel: int, length: int, tflops: float) -> int:
    """Tokens of a micro-batch whose layers a GPU of ``tflops`` computes just while the host
    launches them; its rows have ``length`` tokens. A smaller micro-batch takes as long.

    bloom-7b1 on an H100, in rows of 2,048 tokens: 1,342 (TP 1) and 4,351 (TP 2); bloom-1b7: 4,848
    and 15,714.
    """
    layer, _ = flops_per_token(shape, length)
    rate = utilisation(shape.hidden) * tflops * 1e12 * tensor_parallel
    return int(LAUNCH_S[tensor_parallel > 1] * rate / layer)


def group(config: TrainerConfig) -> int:
    """The number of a rank's micro-batches is a multiple of this: the interleaved schedule takes
    them in groups of the pipeline's size."""
    return config.pipeline_parallel if config.virtual_pipeline > 1 else 1


def micro_batches(
    rows: int, length: int, max_rows: int, stages: int = 1, group: int = 1, min_tokens: int = 0
) -> tuple[float, int]:
    """Best division of a rank's ``rows`` of ``length`` tokens -> (time in tokens, rows of a
    micro-batch).

    The time is (micro-batches + stages - 1) x (tokens of a micro-batch, at least ``min_tokens``, +
    OVERHEAD): a pipeline's bubble and the launching of kernels in one number. A micro-batch has at
    most ``max_rows`` rows, and their number is a multiple of ``group``. Returns (inf, 0) where no
    size divides the rows so.

    >>> micro_batches(64, 512, 32, stages=2), micro_batches(64, 512, 32, stages=2, min_tokens=17400)
    ((34320, 1), (52248, 32))
    """
    sizes = [size for size in range(1, min(max_rows, rows) + 1) if rows % size == 0 and rows // size % group == 0]
    return min(
        (((rows // size + stages - 1) * (max(size * length, min_tokens) + OVERHEAD), size) for size in sizes),
        default=(float("inf"), 0),
    )
