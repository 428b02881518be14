"""The rows of benchmarks/multi_gpu/suite.py as Markdown: a table for each part."""

from __future__ import annotations

import dataclasses

from launcher.config.profile import Machine
from launcher.estimates import iteration_time, step_time
from launcher.slurm import network

PHASES = ("generate", "score", "update")
PARTS = ("gradients", "sft", "reshard", "ppo", "saved", "loaded", "fails")


def tables(rows: list[dict], card: dict) -> str:
    """All tables that have rows, and the errors below them."""
    by_part = {part: [row for row in rows if row["part"] == part and "error" not in row] for part in PARTS}
    texts = [
        gradients_table([row for row in by_part["gradients"] if "worst" in row]),
        sft_table(by_part["sft"]),
        reshard_table([row for row in by_part["reshard"] if row["gb"] > 0], card),
        ppo_table(by_part["ppo"]),
        checkpoint_table([*by_part["saved"], *by_part["loaded"]]),
    ]
    errors = [f"a rank that fails alone: {row['said']}" for row in by_part["fails"]]
    errors += [f"{row['job']}, {layout_of(row)}: {row['error']}" for row in rows if "error" in row]
    return "\n".join([f"{card['name']}\n", *filter(None, texts), *errors])


def gradients_table(rows: list[dict]) -> str:
    lines = [
        [
            row["size"],
            layout_of(row),
            f"{row['loss_off']:.1e}",
            f"{row['worst']:.1e} ({row['of']})",
            f"{row['median']:.1e}",
            row["ok"],
        ]
        for row in rows
    ]
    return table(["model", "layout", "loss", "worst gradient", "median", "ok"], lines)


def sft_table(rows: list[dict]) -> str:
    lines = [
        [
            row["gpus"],
            layout_of(row),
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
        for row in rows
    ]
    speed = ["tokens/s", "predicted", "apart", "MFU"]
    heads = ["GPUs", "layout", "rows, recompute", *speed, "GB", "estimate", "first step s", "loss"]
    return table(heads, lines)


def reshard_table(rows: list[dict], card: dict) -> str:
    lines = [
        [
            layout_of(row),
            row["generation"],
            f"{row['seconds']:.3f}",
            f"{reshard_seconds(row, card):.3f}",
            apart(row["seconds"], reshard_seconds(row, card)),
            f"{row['gb']:.2f}",
            f"{row['gb'] / row['seconds']:.0f}",
            f"{row['first']:.2f}",
        ]
        for row in rows
    ]
    heads = ["training", "generation TP", "seconds", "predicted", "apart", "GB received a GPU", "GB/s", "first s"]
    return table(heads, lines)


def ppo_table(rows: list[dict]) -> str:
    lines = [
        [
            f"{row['size']}, {layout_of(row)}",
            row["layout"].get("generation_tensor_parallel", 1),
            f"{row['samples_per_second']:.1f}",
            *(phase_cell(row, phase) for phase in PHASES),
            f"{row['seconds_reshard']:.3f}",
            f"{row['rollout_tokens_per_second']:,.0f}",
            row["rows"],
            f"{max(row[f'peak_gb_{phase}'] for phase in PHASES):.1f}",
            f"{row['estimate_gb']:.1f}",
        ]
        for row in rows
    ]
    phases = [f"{phase} s, predicted, apart" for phase in PHASES]
    rollout = ["of generate: reshard", "rollout tokens/s", "rows"]
    return table(["training", "generation TP", "samples/s", *phases, *rollout, "GB", "estimate"], lines)


def checkpoint_table(rows: list[dict]) -> str:
    lines = [
        [
            row["part"],
            row["gpus"],
            layout_of(row),
            f"{row['gb']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['stall']:.2f}" if "stall" in row else "",
            row.get("steps", ""),
            row["ok"],
        ]
        for row in rows
    ]
    heads = ["checkpoint", "GPUs", "layout", "GB", "seconds", "training stood still", "steps meanwhile", "ok"]
    return table(heads, lines)


def table(heads: list[str], lines: list[list]) -> str:
    """A Markdown table; "" without lines."""
    if not lines:
        return ""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows) + "\n"


def layout_of(row: dict) -> str:
    return layout_name(row["layout"], row["gpus"])


def layout_name(layout: dict, gpus: int) -> str:
    """ "TP 2 x PP 2, SP" and the like."""
    tensor, stages, virtual = (
        layout.get(key, 1) for key in ("tensor_parallel", "pipeline_parallel", "virtual_pipeline")
    )
    sizes = {"TP": tensor, "PP": stages, "DP": gpus // (tensor * stages)}
    parts = [" x ".join(f"{key} {size}" for key, size in sizes.items() if size > 1) or "one GPU"]
    parts += ["SP"] if layout.get("sequence_parallel") else []
    parts += [f"VPP {virtual}"] if virtual > 1 else []
    parts += ["not compiled"] if layout.get("compile") is False else []
    return ", ".join(parts)


def phase_cell(row: dict, phase: str) -> str:
    seconds, predicted = row[f"seconds_{phase}"], row[f"predicted_{phase}"]
    return f"{seconds:.2f}, {predicted:.2f}, {apart(seconds, predicted)}"


def apart(measured: float, predicted: float) -> str:
    """By how much the measured value differs from the predicted one, in percent."""
    return f"{100 * (measured / predicted - 1):+.0f}%"


def machine(card: dict) -> Machine:
    h200 = step_time.known_rates("h200", network.named("one-machine"))
    return dataclasses.replace(h200, memory_gb_s=card["memory_gb_s"])


def reshard_seconds(row: dict, card: dict) -> float:
    """Seconds on paper to move the weights to the generation layout."""
    return iteration_time.moving(machine(card), 1e9 * row["link_gb"], 1e9 * row["memory_gb"])
