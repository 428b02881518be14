"""What benchmarks/multi_gpu/suite.py found, as Markdown."""

from __future__ import annotations

import dataclasses

from launcher.config.profile import Machine
from launcher.estimates import iteration_time, step_time
from launcher.slurm import network


def name(layout: dict, gpus: int) -> str:
    """ "TP 2 x PP 2, SP" and the like."""
    tensor, stages, virtual = (
        layout.get(key, 1) for key in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline")
    )
    sizes = {"TP": tensor, "PP": stages, "DP": gpus // (tensor * stages)}
    words = [" x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1) or "one GPU"]
    words += ["SP"] if layout.get("sequence_parallel") else []
    words += [f"VPP {virtual}"] if virtual > 1 else []
    words += ["not compiled"] if layout.get("compile") is False else []
    return ", ".join(words)


def table(heads: list[str], lines: list[list]) -> str:
    return (
        "\n".join(f"| {' | '.join(map(str, line))} |" for line in (heads, ["---"] * len(heads), *lines)) + "\n"
        if lines
        else ""
    )


def apart(measured: float, predicted: float) -> str:
    return f"{100 * (measured / predicted - 1):+.0f}%"


def machine(card: dict) -> Machine:
    h200 = step_time.known_rates("h200", network.named("one-machine"))
    return dataclasses.replace(h200, memory_gb_s=card["memory_gb_s"])


def moving(row: dict, card: dict) -> float:
    """Seconds that the weights' way takes on paper."""
    return iteration_time.moving(machine(card), 1e9 * row["link_gb"], 1e9 * row["memory_gb"])


PHASES = ("generate", "score", "update")


def beside(row: dict, phase: str) -> str:
    seconds, predicted = row[f"seconds_{phase}"], row[f"predicted_{phase}"]
    return f"{seconds:.2f}, {predicted:.2f}, {apart(seconds, predicted)}"


def tables(rows: list[dict], card: dict) -> str:
    found = {
        part: [row for row in rows if row["part"] == part and "error" not in row]
        for part in ("gradients", "sft", "reshard", "ppo", "saved", "loaded", "fails")
    }
    made = [
        table(
            ["model", "layout", "loss", "worst gradient", "median", "ok"],
            [
                [
                    row["size"],
                    name(row["layout"], row["gpus"]),
                    f"{row['loss_off']:.1e}",
                    f"{row['worst']:.1e} ({row['of']})",
                    f"{row['median']:.1e}",
                    row["ok"],
                ]
                for row in found["gradients"]
                if "worst" in row
            ],
        ),
        table(
            [
                "GPUs",
                "layout",
                "rows, recompute",
                "tokens/s",
                "predicted",
                "apart",
                "MFU",
                "GB",
                "estimate",
                "first step s",
                "loss",
            ],
            [
                [
                    row["gpus"],
                    name(row["layout"], row["gpus"]),
                    f"{row['layout']['micro_batch_size']}, {row['layout']['recompute']}",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['tokens_per_second'] * row['step_s'] / row['predicted_s']:,.0f}",
                    apart(row["predicted_s"], row["step_s"]),
                    f"{100 * row['mfu']:.1f}%",
                    f"{row['peak_gb']:.1f}",
                    f"{row['estimate_gb']:.1f}",
                    f"{row['first_s']:.0f}",
                    f"{row['loss']:.4f}",
                ]
                for row in found["sft"]
            ],
        ),
        table(
            ["training", "generation TP", "seconds", "predicted", "apart", "GB received a GPU", "GB/s", "first s"],
            [
                [
                    name(row["layout"], row["gpus"]),
                    row["generation"],
                    f"{row['seconds']:.3f}",
                    f"{moving(row, card):.3f}",
                    apart(row["seconds"], moving(row, card)),
                    f"{row['gb']:.2f}",
                    f"{row['gb'] / row['seconds']:.0f}",
                    f"{row['first']:.2f}",
                ]
                for row in found["reshard"]
                if row["gb"] > 0
            ],
        ),
        table(
            [
                "training",
                "generation TP",
                "samples/s",
                *(f"{phase} s, predicted, apart" for phase in PHASES),
                "of generate: reshard",
                "rollout tokens/s",
                "rows",
                "GB",
                "estimate",
            ],
            [
                [
                    f"{row['size']}, {name(row['layout'], row['gpus'])}",
                    row["layout"].get("generation_tensor_parallel", 1),
                    f"{row['samples_per_second']:.1f}",
                    *(beside(row, phase) for phase in PHASES),
                    f"{row['seconds_reshard']:.3f}",
                    f"{row['rollout_tokens_per_second']:,.0f}",
                    row["rows"],
                    f"{max(row[f'peak_gb_{phase}'] for phase in PHASES):.1f}",
                    f"{row['estimate_gb']:.1f}",
                ]
                for row in found["ppo"]
            ],
        ),
        table(
            ["checkpoint", "GPUs", "layout", "GB", "seconds", "training stood still", "steps beside it", "ok"],
            [
                [
                    row["part"],
                    row["gpus"],
                    name(row["layout"], row["gpus"]),
                    f"{row['gb']:.2f}",
                    f"{row['seconds']:.2f}",
                    f"{row['stall']:.2f}" if "stall" in row else "",
                    row.get("steps", ""),
                    row["ok"],
                ]
                for row in (*found["saved"], *found["loaded"])
            ],
        ),
    ]
    failed = [f"a rank that fails alone: {row['said']}" for row in found["fails"]]
    failed += [f"{row['job']}, {name(row['layout'], row['gpus'])}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([f"{card['name']}\n", *filter(None, made), *failed])
