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

from launcher.estimates import step_time
from launcher.slurm import sites
from training.config.trainers import Paths, SFTConfig
from training.models.bloom.table import shape as bloom

MODELS = {
    "7b1": (bloom(30, 4096, 32, 250880, 1e-5), 256, (8, 32)),
    "176b": (bloom(70, 14336, 112, 250880, 1e-5), 512, (64, 128)),
}
SITES = {"A100": "a100", "H800": "h800"}
"""Name of the GPU -> profile of slurm/clusters."""


def main() -> None:
    print(step_time.__doc__)
    print(
        "| model | GPUs | TP | PP | DP | rows | recompute | s a step | tokens/s | MFU | GB | "
        "compute, bubble, launch, TP, PP, DP, optimizer in % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (shape, rows, sizes) in MODELS.items():
        for site, profile in SITES.items():
            machine = step_time.machine_of(sites.load(profile))
            for ranks in sizes:
                config = SFTConfig(
                    paths=Paths("", "", "", "", ""),
                    global_batch_size=rows,
                    micro_batch_size=1,
                    optimizer_precision="bf16",
                )
                for made in step_time.layouts(shape, config, ranks, machine, 8, 85.0)[:3]:
                    used = made.config
                    data = used.data_parallel(ranks)
                    shares = ", ".join(f"{100 * seconds / made.seconds:.0f}" for seconds in made.parts.values())
                    print(
                        f"| {name} | {ranks} x {site} | {used.tensor_parallel} | {used.pipeline_parallel} | {data} "
                        f"| {used.micro_batch_size} | {used.recompute} | {made.seconds:.2f} "
                        f"| {rows * used.seq_length / made.seconds:,.0f} | {100 * made.mfu:.1f}% | "
                        f"{made.memory_gb:.0f} | {shares} |"
                    )


if __name__ == "__main__":
    main()
