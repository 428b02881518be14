"""Which jobs benchmarks/multi_gpu/suite.py runs on N GPUs, and what launcher/estimates/step_time.py
expects of them. Pure, standard library only."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass

from benchmarks.multi_gpu.tables import machine, name
from launcher.estimates import iteration_time, memory, step_time
from training.config.trainers import Paths, PPOConfig, PPOPaths, SFTConfig
from training.errors import ConfigError
from training.models.bloom.table import shape as bloom

SHAPES = {
    "560m": bloom(24, 1024, 16, 250880, 1e-5),
    "1b7": bloom(24, 2048, 16, 250880, 1e-5),
    "7b1": bloom(30, 4096, 32, 250880, 1e-5),
    "tiny": bloom(8, 64, 8, 1000, 1e-5),
}
MEMORY_GB_S = {"H100": 3350, "H200": 4800}
PARTS = ("gradients", "fails", "sft", "halves", "checkpoint", "ppo", "large")
ON_PURPOSE = "this rank fails alone on purpose"
"""What the job "fails" is for."""
WARM = 5
"""Jobs that compile beforehand: they share the GPUs with those that compare gradients, which need
up to 60 GB, and take 2 to 7 each. So the first two share them with what one GPU does alone, the
others with what several do."""


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
    plain = {"compile": False, "attention": "sdpa"}
    if gpus == 1:
        return [layout(**plain)]
    half = gpus // 2
    if half > 1:
        mixed = [layout(2, half, 2, **plain), layout(2, sequence=False, **plain), layout(1, 2, **plain)]
    else:
        mixed = [layout(gpus, sequence=False, **plain), layout(1, gpus, 2, **plain)]
    return [layout(gpus, **plain), layout(1, gpus, **plain), layout(**plain), *mixed, layout(2)]


def timed_layouts(size: str, gpus: int, card: dict) -> list[dict]:
    """Of SFT, with rows and recompute; those that don't fit are left out and said."""
    half = gpus // 2
    asked = [layout(gpus), layout(1, gpus), layout(), layout(gpus, compile=False)] if gpus > 1 else [layout()]
    if half > 1:
        asked = [
            layout(2, half),
            layout(2, half, 2),
            layout(1, gpus),
            layout(1, gpus, 2),
            layout(),
            layout(gpus),
            layout(2),
        ]
    found: list[dict] = []
    for one in asked:
        alike = next((other for other in found if {**other, **one} == {**other, "virtual_pipeline": 2}), {})
        # to be compared with the same in one part
        rows = {key: alike[key] for key in ("micro_batch_size", "recompute") if alike}
        made = fitting(size, {**one, **rows}, gpus, card) or fitting(size, one, gpus, card)
        if made is None:
            why = f"the layers do not divide so, or no rows and recompute fit {card['memory_gb']:.0f} GB"
            print(json.dumps({"part": "sft", "skipped": one, "why": why}), flush=True)
        else:
            found.append(made)
    return found


def fitting(size: str, one: dict, gpus: int, card: dict) -> dict | None:
    """``one`` with the fastest rows and recompute that fit, where it says neither, by
    launcher/estimates/step_time.py; of equals more rows, and less recompute."""
    best = None
    for rows in (4, 2, 1):
        for recompute in ("none", "selective", "full"):
            values = {"micro_batch_size": rows, "recompute": recompute, "global_batch_size": 8 * gpus, **one}
            try:
                made = predicted(size, values, gpus, card)
            except ConfigError:
                continue
            if made.memory_gb <= memory.FITS * card["memory_gb"] and (best is None or made.seconds < 0.99 * best[0]):
                best = made.seconds, values
    return best and best[1]


def predicted(size: str, values: dict, gpus: int, card: dict) -> step_time.Step:
    config = SFTConfig(
        paths=Paths("", "", "", "", ""),
        seq_length=128 if size == "tiny" else 2048,
        optimizer_precision="bf16",
        **values,
    )
    return step_time.step(SHAPES[size], config, gpus, machine(card), gpus)


def ppo_values(size: str) -> dict:
    """Samples, and a token budget that keeps GPUs busy whose layers are launched with messages
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
    """What matters least, last. ``only``: see ``chosen``."""
    small, middle, large = ("tiny",) * 3 if tiny else ("560m", "1b7", "7b1")
    sizes = dict.fromkeys((small, middle))
    untimed: list[Job] = []
    if "gradients" in parts and gpus > 1:
        untimed = [
            Job(f"gradients {size}", "gradients", size, list(range(gpus)), divisions(gpus), 120) for size in sizes
        ]
    if "fails" in parts and gpus > 1:
        untimed.append(Job("fails", "fails", small, list(range(gpus)), [layout()], 60))
    making = {
        "ppo": lambda: ppo_jobs(middle, gpus),
        "large": lambda: large_ppo(large, gpus),
        "checkpoint": lambda: checkpoint_jobs(middle, gpus),
        "sft": lambda: [[job] for job in timed_jobs(large, [list(range(gpus))], card)],
        "halves": lambda: side_by_side(large, gpus, card),
    }
    found = [wave for part, made in making.items() if part in parts for wave in made()]
    untimed, found = [job for wave in chosen([untimed], only) for job in wave], chosen(found, only)
    compared = (
        {job.size for job in untimed if job.part == "gradients"}
        if gpus > 1
        else set(sizes)
        if "gradients" in parts
        else ()
    )
    first = [
        Job(f"one GPU {size}", "gradients", size, [number % gpus], divisions(1), 100)
        for number, size in enumerate(sizes)
        if size in compared
    ]
    learnt = dict.fromkeys(job.size for wave in found for job in wave if job.part == "ppo")
    first += [
        Job(f"prepare {size}", "prepared", size, [(gpus - 1 - number) % gpus], [layout()], 150)
        for number, size in enumerate(learnt)
    ]
    every = [job for wave in found for job in wave]
    if not tiny:
        warm = warming(every, gpus, card)
        # two GPUs have no room for 1b7's layouts beside others
        beside = 1 if gpus < 4 else len(untimed)
        made = [
            *([first + warm[:2], untimed[:beside] + warm[2:], untimed[beside:]] if untimed else [first + warm]),
            *found,
        ]
    elif card["count"]:  # numbers mean nothing: what does not need another job's files runs at once
        loads = [job for job in every if job.part == "loaded"]
        made = [first, untimed + [job for job in every if job not in loads], loads]
    else:  # a few cores: one after the other
        made = [[job] for wave in (first, untimed, every) for job in wave]
    return [wave for wave in made if wave]


def chosen(planned: Waves, only: list[str]) -> Waves:
    """The jobs, and of them the layouts, of whose "job, layout" one of the regular expressions
    matches a part; without any, all."""
    if not only:
        return planned
    kept = [
        [
            dataclasses.replace(
                job,
                layouts=[
                    one
                    for one in job.layouts
                    if any(re.search(regex, f"{job.name}, {name(one, len(job.gpus))}") for regex in only)
                ],
            )
            for job in wave
        ]
        for wave in planned
    ]
    return [[job for job in wave if job.layouts] for wave in kept]


def side_by_side(size: str, gpus: int, card: dict) -> Waves:
    """SFT on one half of the GPUs and on the other."""
    half = gpus // 2
    if half < 2:
        return []
    jobs = timed_jobs(size, [list(range(half)), list(range(half, gpus))], card)
    return [jobs[start : start + 2] for start in range(0, len(jobs), 2)]


def timed_jobs(size: str, places: list[list[int]], card: dict) -> list[Job]:
    """SFT on ``places`` in turn; what needs the same compiled graphs are layouts of one job."""
    alike: dict[tuple, list[dict]] = {}
    for one in timed_layouts(size, len(places[0]), card):
        alike.setdefault(
            tuple(one.get(key) for key in ("tensor_parallel", "micro_batch_size", "recompute", "compile")), []
        ).append(one)
    return [
        Job(f"sft {len(places[0])}, {number}", "sft", size, places[number % len(places)], some, 40 + 40 * len(some))
        for number, some in enumerate(alike.values())
    ]


def ppo_jobs(size: str, gpus: int) -> Waves:
    ways = [layout()]
    if gpus > 1:
        ways = [layout(2, gpus // 2, generation_tensor_parallel=1), layout(1, 2, generation_tensor_parallel=2)]
    return [[Job(f"ppo {number}", "ppo", size, list(range(gpus)), [way], 100)] for number, way in enumerate(ways)]


def large_ppo(size: str, gpus: int) -> Waves:
    """On GPUs of 80 GB 59 a GPU by launcher/estimates/memory.py on 8, 62 on 4, 70 on 2, whose
    optimizers wait in the host's memory (113 GB)."""
    ways = {
        2: layout(2, generation_tensor_parallel=1, offload="all", micro_batch_tokens=8192),
        4: layout(4, generation_tensor_parallel=2, micro_batch_tokens=8192),
    }
    way = ways.get(gpus, layout(4, generation_tensor_parallel=2))
    return [[Job("large ppo", "ppo", size, list(range(gpus)), [way], 240)]] if gpus > 1 else []


def checkpoint_jobs(size: str, gpus: int) -> Waves:
    plain, half = {"compile": False, "attention": "sdpa"}, max(gpus // 2, 1)
    save = layout(2, 2, **plain) if gpus > 2 else layout(gpus, **plain)
    return [
        [Job("save", "saved", size, list(range(gpus)), [save], 80)],
        [Job("load", "loaded", size, list(range(half)), [layout(1, half, **plain)], 60)],
    ]


def warming(jobs: list[Job], gpus: int, card: dict) -> list[Job]:
    """Jobs that compile beforehand, at the same time, what the first of ``jobs`` will need: a graph
    for each tensor-parallel size, shape of a micro-batch and kind of recompute."""
    wanted: dict[tuple, None] = {}
    for job in jobs:
        for values in job.layouts if job.part in ("sft", "ppo") else ():
            if values.get("compile", True):
                rows, length = values.get("micro_batch_size"), 2048
                if job.part == "ppo":
                    config = ppo_config(job.size, values)
                    rows, length = iteration_time.iteration(
                        SHAPES[job.size], config, len(job.gpus), machine(card), len(job.gpus)
                    ).micro_batch
                wanted[job.size, values["tensor_parallel"], rows, values.get("recompute", "none"), length] = None
    made, first = [], 0
    for size, tensor, rows, recompute, length in list(wanted)[:WARM]:
        one = layout(tensor, micro_batch_size=rows, recompute=recompute, seq_length=length)
        made.append(
            Job(f"warm {len(made)}", "warm", size, [(first + number) % gpus for number in range(tensor)], [one], 110)
        )
        first += tensor
    return made


def with_prediction(row: dict, card: dict) -> dict:
    if "error" in row:
        return row
    if row["part"] == "ppo":
        config, gpus = ppo_config(row["size"], row["layout"]), row["gpus"]
        made = iteration_time.iteration(SHAPES[row["size"]], config, gpus, machine(card), gpus)
        estimate = memory.estimate(SHAPES[row["size"]], config, gpus).total - memory.OUTSIDE_GB
        return row | {
            "rows": made.micro_batch[0],
            "predicted_generate": made.generate,
            "predicted_score": made.score,
            "predicted_update": made.update,
            "estimate_gb": estimate,
        }
    if row["part"] != "sft":
        return row
    made = predicted(row["size"], row["layout"], row["gpus"], card)
    return row | {
        "predicted_s": made.seconds,
        "predicted_mfu": made.mfu,
        "estimate_gb": made.memory_gb - memory.OUTSIDE_GB,
    }
