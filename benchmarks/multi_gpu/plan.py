"""Which jobs benchmarks/multi_gpu/suite.py runs on N GPUs, and what launcher/estimates/step_time.py
predicts of them. Pure; standard library only."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from benchmarks.common import print_row, sft_config
from benchmarks.multi_gpu.tables import layout_name, machine
from benchmarks.shapes import SHAPES
from launcher.estimates import iteration_time, memory, step_time
from training.config.trainers import PPOConfig, PPOPaths
from training.errors import ConfigError

MEMORY_GB_S = {"H100": 3350, "H200": 4800}
"""Rate of a GPU's memory."""
UNCOMPILED = {"compile": False, "attention": "sdpa"}
PARTS = ("gradients", "fails", "sft", "halves", "checkpoint", "ppo", "large")
ON_PURPOSE = "this rank fails alone on purpose"
"""The error of the job "fails"."""
WARM_JOBS = 5
"""Jobs that compile beforehand. They take 2 to 7 GB each, and share the GPUs with the jobs that
compare gradients, which need up to 60 GB. The first two run with the jobs of one GPU, the others
with the jobs of several."""


@dataclass
class Job:
    """Processes on some GPUs, one layout after the other."""

    name: str
    part: str
    size: str
    gpus: list[int]
    layouts: list[dict]
    limit: float
    """Most seconds."""


def layout(tensor: int = 1, stages: int = 1, virtual: int = 1, sequence: bool | None = None, **values) -> dict:
    sequence = tensor > 1 if sequence is None else sequence
    return {
        "tensor_parallel": tensor,
        "pipeline_parallel": stages,
        "virtual_pipeline": virtual,
        "sequence_parallel": sequence,
        **values,
    }


def divisions(gpus: int) -> list[dict]:
    """The ways to divide a model over ``gpus`` that are checked."""
    if gpus == 1:
        return [layout(**UNCOMPILED)]
    half = gpus // 2
    pure = [layout(gpus, **UNCOMPILED), layout(1, gpus, **UNCOMPILED), layout(**UNCOMPILED)]
    if half > 1:
        mixed = [layout(2, half, 2, **UNCOMPILED), layout(2, sequence=False, **UNCOMPILED), layout(1, 2, **UNCOMPILED)]
    else:
        mixed = [layout(gpus, sequence=False, **UNCOMPILED), layout(1, gpus, 2, **UNCOMPILED)]
    return [*pure, *mixed, layout(2)]


def timed_layouts(size: str, gpus: int, card: dict) -> list[dict]:
    """The layouts of SFT, with rows and recompute. A line is printed for each that doesn't fit."""
    half = gpus // 2
    if half > 1:
        layouts = [layout(2, half), layout(2, half, 2), layout(1, gpus), layout(1, gpus, 2)]
        layouts += [layout(), layout(gpus), layout(2)]
    else:
        layouts = [layout(gpus), layout(1, gpus), layout(), layout(gpus, compile=False)] if gpus > 1 else [layout()]
    timed: list[dict] = []
    for candidate in layouts:
        alike = next((other for other in timed if {**other, **candidate} == {**other, "virtual_pipeline": 2}), {})
        # the same rows and recompute as in one part, to be compared with it
        rows = {key: alike[key] for key in ("micro_batch_size", "recompute") if alike}
        fitted = fitting(size, {**candidate, **rows}, gpus, card) or fitting(size, candidate, gpus, card)
        if fitted is None:
            reason = f"the layers do not divide so, or no rows and recompute fit {card['memory_gb']:.0f} GB"
            print_row(part="sft", skipped=candidate, why=reason)
        else:
            timed.append(fitted)
    return timed


def fitting(size: str, layout: dict, gpus: int, card: dict) -> dict | None:
    """``layout`` with the fastest rows and recompute that fit, by launcher/estimates/step_time.py;
    None where nothing fits. Rows and recompute that it has stay. Among equals: more rows, and less
    recompute."""
    best_s, best = None, None
    for rows in (4, 2, 1):
        for recompute in ("none", "selective", "full"):
            values = {"micro_batch_size": rows, "recompute": recompute, "global_batch_size": 8 * gpus, **layout}
            try:
                step = predicted(size, values, gpus, card)
            except ConfigError:
                continue
            fits = step.memory_gb <= memory.FITS * card["memory_gb"]
            if fits and (best_s is None or step.seconds < 0.99 * best_s):
                best_s, best = step.seconds, values
    return best


def predicted(size: str, values: dict, gpus: int, card: dict) -> step_time.Step:
    seq_length = 128 if size == "tiny" else 2048
    config = sft_config(seq_length=seq_length, optimizer_precision="bf16", **values)
    return step_time.step(SHAPES[size], config, gpus, machine(card), gpus)


def ppo_values(size: str) -> dict:
    """Samples, and a token budget that keeps the GPUs busy while layers and messages are launched
    (training/config/cost.py)."""
    if size == "tiny":
        return dict(
            prompt_length=16, response_length=8, rollout_batch_size=32, global_batch_size=16, micro_batch_tokens=128
        )
    return dict(
        prompt_length=256, response_length=256, rollout_batch_size=256, global_batch_size=64, micro_batch_tokens=16384
    )


def ppo_config(size: str, values: dict) -> PPOConfig:
    return PPOConfig(
        paths=PPOPaths("", "", "", "", "", ""),
        precision="bf16",
        optimizer_precision="bf16",
        **ppo_values(size) | values,
    )


Waves = list[list[Job]]
"""Jobs that run at the same time, wave by wave."""


def waves(gpus: int, tiny: bool, card: dict, parts: list[str], only: list[str] = ()) -> Waves:
    """All waves, the most important first. ``only``: see ``select``."""
    small, middle, large = ("tiny",) * 3 if tiny else ("560m", "1b7", "7b1")
    sizes = list(dict.fromkeys((small, middle)))
    untimed = [job for wave in select([untimed_jobs(gpus, small, sizes, parts)], only) for job in wave]
    planners = {
        "ppo": lambda: ppo_jobs(middle, gpus),
        "large": lambda: large_ppo(large, gpus),
        "checkpoint": lambda: checkpoint_jobs(middle, gpus),
        "sft": lambda: [[job] for job in timed_jobs(large, [list(range(gpus))], card)],
        "halves": lambda: side_by_side(large, gpus, card),
    }
    timed = select([wave for part, plan in planners.items() if part in parts for wave in plan()], only)
    measured = [job for wave in timed for job in wave]
    compared = {job.size for job in untimed if job.part == "gradients"}
    if gpus == 1:
        compared = set(sizes) if "gradients" in parts else set()
    first = reference_jobs(gpus, [size if size in compared else None for size in sizes])
    first += prepare_jobs(gpus, [job.size for job in measured if job.part == "ppo"])
    if not tiny:
        warm = warm_jobs(measured, gpus, card)
        # two GPUs have no room for 1b7's layouts and other jobs at once
        together = 1 if gpus < 4 else len(untimed)
        before = [first + warm[:2], untimed[:together] + warm[2:], untimed[together:]] if untimed else [first + warm]
        planned = [*before, *timed]
    elif card["count"]:  # the numbers mean nothing: only the load waits, for the save's files
        loads = [job for job in measured if job.part == "loaded"]
        planned = [first, untimed + [job for job in measured if job not in loads], loads]
    else:  # a few cores: one after the other
        planned = [[job] for wave in (first, untimed, measured) for job in wave]
    return [wave for wave in planned if wave]


def untimed_jobs(gpus: int, small: str, sizes: list[str], parts: list[str]) -> list[Job]:
    """Jobs of several GPUs whose time does not matter."""
    every, jobs = list(range(gpus)), []
    if "gradients" in parts and gpus > 1:
        jobs += [Job(f"gradients {size}", "gradients", size, every, divisions(gpus), 120) for size in sizes]
    if "fails" in parts and gpus > 1:
        jobs.append(Job("fails", "fails", small, every, [layout()], 60))
    return jobs


def reference_jobs(gpus: int, sizes: list[str | None]) -> list[Job]:
    """One GPU's gradients of each size, on different GPUs."""
    return [
        Job(f"one GPU {size}", "gradients", size, [number % gpus], divisions(1), 100)
        for number, size in enumerate(sizes)
        if size
    ]


def prepare_jobs(gpus: int, sizes: list[str]) -> list[Job]:
    """The inputs of PPO for each size, from the last GPU on."""
    return [
        Job(f"prepare {size}", "prepared", size, [(gpus - 1 - number) % gpus], [layout()], 150)
        for number, size in enumerate(dict.fromkeys(sizes))
    ]


def select(planned: Waves, only: list[str]) -> Waves:
    """The layouts whose "job, layout" matches one of the regular expressions, and the jobs that
    have some; all of them without an expression."""
    if not only:
        return planned

    def matches(job: Job, layout: dict) -> bool:
        text = f"{job.name}, {layout_name(layout, len(job.gpus))}"
        return any(re.search(regex, text) for regex in only)

    def selected(job: Job) -> Job:
        return dataclasses.replace(job, layouts=[layout for layout in job.layouts if matches(job, layout)])

    waves = [[selected(job) for job in wave] for wave in planned]
    return [[job for job in wave if job.layouts] for wave in waves]


def side_by_side(size: str, gpus: int, card: dict) -> Waves:
    """SFT on one half of the GPUs and on the other."""
    half = gpus // 2
    if half < 2:
        return []
    jobs = timed_jobs(size, [list(range(half)), list(range(half, gpus))], card)
    return [jobs[start : start + 2] for start in range(0, len(jobs), 2)]


def timed_jobs(size: str, places: list[list[int]], card: dict) -> list[Job]:
    """SFT on ``places`` in turn. Layouts that need the same compiled graphs are of one job."""
    graphs: dict[tuple, list[dict]] = {}
    for candidate in timed_layouts(size, len(places[0]), card):
        key = tuple(candidate.get(name) for name in ("tensor_parallel", "micro_batch_size", "recompute", "compile"))
        graphs.setdefault(key, []).append(candidate)
    count = len(places[0])
    return [
        Job(f"sft {count}, {number}", "sft", size, places[number % len(places)], layouts, 40 + 40 * len(layouts))
        for number, layouts in enumerate(graphs.values())
    ]


def ppo_jobs(size: str, gpus: int) -> Waves:
    ways = [layout()]
    if gpus > 1:
        ways = [layout(2, gpus // 2, generation_tensor_parallel=1), layout(1, 2, generation_tensor_parallel=2)]
    return [[Job(f"ppo {number}", "ppo", size, list(range(gpus)), [way], 100)] for number, way in enumerate(ways)]


def large_ppo(size: str, gpus: int) -> Waves:
    """PPO of 7b1. On GPUs of 80 GB launcher/estimates/memory.py expects 59 GB a GPU on 8, 62 on 4
    and 70 on 2, whose optimizers wait in the host's memory (113 GB)."""
    ways = {
        2: layout(2, generation_tensor_parallel=1, offload="all", micro_batch_tokens=8192),
        4: layout(4, generation_tensor_parallel=2, micro_batch_tokens=8192),
    }
    way = ways.get(gpus, layout(4, generation_tensor_parallel=2))
    return [[Job("large ppo", "ppo", size, list(range(gpus)), [way], 240)]] if gpus > 1 else []


def checkpoint_jobs(size: str, gpus: int) -> Waves:
    half = max(gpus // 2, 1)
    save = layout(2, 2, **UNCOMPILED) if gpus > 2 else layout(gpus, **UNCOMPILED)
    return [
        [Job("save", "saved", size, list(range(gpus)), [save], 80)],
        [Job("load", "loaded", size, list(range(half)), [layout(1, half, **UNCOMPILED)], 60)],
    ]


def warm_jobs(jobs: list[Job], gpus: int, card: dict) -> list[Job]:
    """Jobs that compile beforehand, at the same time, what the first of ``jobs`` need: a graph for
    each tensor-parallel size, shape of a micro-batch and kind of recompute."""
    graphs: dict[tuple, None] = {}
    for job in jobs:
        for values in job.layouts if job.part in ("sft", "ppo") else ():
            if values.get("compile", True):
                rows, length = values.get("micro_batch_size"), 2048
                if job.part == "ppo":
                    rows, length = predicted_iteration(job.size, values, len(job.gpus), card).micro_batch
                graphs[job.size, values["tensor_parallel"], rows, values.get("recompute", "none"), length] = None
    warm, first = [], 0
    for size, tensor, rows, recompute, length in list(graphs)[:WARM_JOBS]:
        values = layout(tensor, micro_batch_size=rows, recompute=recompute, seq_length=length)
        places = [(first + number) % gpus for number in range(tensor)]
        warm.append(Job(f"warm {len(warm)}", "warm", size, places, [values], 110))
        first += tensor
    return warm


def predicted_iteration(size: str, values: dict, gpus: int, card: dict) -> iteration_time.Iteration:
    return iteration_time.iteration(SHAPES[size], ppo_config(size, values), gpus, machine(card), gpus)


def with_prediction(row: dict, card: dict) -> dict:
    """The row of a measured job with what the launcher's estimates predict of it."""
    if "error" in row or row["part"] not in ("ppo", "sft"):
        return row
    size, values, gpus = row["size"], row["layout"], row["gpus"]
    if row["part"] == "ppo":
        iteration = predicted_iteration(size, values, gpus, card)
        estimate = memory.estimate(SHAPES[size], ppo_config(size, values), gpus).total - memory.OUTSIDE_GB
        return row | {
            "rows": iteration.micro_batch[0],
            "predicted_generate": iteration.generate,
            "predicted_score": iteration.score,
            "predicted_update": iteration.update,
            "estimate_gb": estimate,
        }
    step = predicted(size, values, gpus, card)
    estimate = step.memory_gb - memory.OUTSIDE_GB
    return row | {"predicted_s": step.seconds, "predicted_mfu": step.mfu, "estimate_gb": estimate}
