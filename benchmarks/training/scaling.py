"""Which layout would be fastest on a cluster, on paper? ``python benchmarks/training/scaling.py``

SFT of bloom-7b1 and bloom-176b at 2,048 tokens a row on nodes of 8 A100 or H800 with 80 GB: step
time and MFU by launcher/estimates/step_time.py, whose docstring is the list of assumptions; its one
measured input is the share of the peak on one H200 (benchmarks/training/train.py). Nothing of this
was run on such a cluster. The first line of each block is the fastest: ``plan --suggest``'s.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import sft_config
from benchmarks.shapes import SHAPES
from launcher.estimates import step_time
from launcher.slurm import sites

MODELS = {"7b1": (256, (8, 32)), "176b": (512, (64, 128))}
"""Model -> rows of a global batch, numbers of GPUs."""
SITES = {"A100": "a100", "H800": "h800"}
"""Name of the GPU -> profile of slurm/clusters."""


def main() -> None:
    print(step_time.__doc__)
    print(
        "| model | GPUs | TP | PP | DP | rows | recompute | s a step | tokens/s | MFU | GB | "
        "compute, bubble, launch, TP, PP, DP, optimizer in % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (rows, sizes) in MODELS.items():
        config = sft_config(global_batch_size=rows, micro_batch_size=1, optimizer_precision="bf16")
        for site, profile in SITES.items():
            machine = step_time.machine_of(sites.load(profile))
            for ranks in sizes:
                steps = step_time.layouts(SHAPES[name], config, ranks, machine, 8, 85.0)
                for step in steps[:3]:
                    print(line(name, site, ranks, step))


def line(name: str, site: str, ranks: int, step: step_time.Step) -> str:
    """A layout's line of the table."""
    config = step.config
    tokens_per_s = config.global_batch_size * config.seq_length / step.seconds
    cells = (
        name,
        f"{ranks} x {site}",
        config.tensor_parallel,
        config.pipeline_parallel,
        config.data_parallel(ranks),
        config.micro_batch_size,
        config.recompute,
        f"{step.seconds:.2f}",
        f"{tokens_per_s:,.0f}",
        f"{100 * step.mfu:.1f}%",
        f"{step.memory_gb:.0f}",
        ", ".join(f"{100 * seconds / step.seconds:.0f}" for seconds in step.parts.values()),
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
