"""How fast is training beside Hugging Face's BLOOM? ``python benchmarks/training/train.py [--models
560m 1b7 3b 7b1] [--out FILE]``

One GPU, random bf16 weights, for each model in a process of its own:

    theirs    Hugging Face BLOOM as TRL would run it: eager attention (it has no other), gradient
              checkpointing, torch's fused AdamW on
              bf16 weights (8 bytes of weights, gradients and moments a parameter), gradients
              clipped
    ours      the SFT trainer's step, optimizer included: the same tokens, loss on all of them,
              optimizer_precision "bf16" (12 bytes)
    recompute ours with recompute = "full", for the memory
    packed    ours with rows of documents as long as Anthropic HH's, loss on the last 40% of each,
              as SFT on real data has it
    forward   the passes of PPO: log-probabilities, reward or values
    profile   kernels of a step by what they do
    shapes    ours with kernels for any number and length of rows, which packed rows get from their
              second shape on

Prints JSON lines and a table: tokens/s, MFU (FLOPs a token: 6 (12 h^2 L + V h) + 6 L h s; 989
TFLOP/s, the H100's and H200's peak in bf16), peak memory (torch.cuda.max_memory_allocated) beside
launcher/estimates/memory.py's estimate, and for ``forward`` the share of a matrix product's rate,
measured in the same process. ``--small``: tiny shapes, also on a CPU, where numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from launcher.estimates import memory
from training import sft
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.distributed import groups
from training.models import chunked_logprobs
from training.models.bloom.table import shape as bloom
from training.models.heads import next_token_logprobs
from training.trainer.step import Batch, Learner, Objective, build_model, evaluate

CUDA = torch.cuda.is_available()
SHAPES = {
    "560m": bloom(24, 1024, 16, 250880, 1e-5),
    "1b7": bloom(24, 2048, 16, 250880, 1e-5),
    "3b": bloom(30, 2560, 32, 250880, 1e-5),
    "7b1": bloom(30, 4096, 32, 250880, 1e-5),
    "small": bloom(2, 64, 4, 1000, 1e-5),
}
ROWS = {"560m": (16, 8), "1b7": (16, 4), "3b": (8, 4), "7b1": (4, 4), "small": (2, 2)}
"""Rows of a micro-batch: ours, theirs (as many as fit, and no more than help)."""
GLOBAL_ROWS = {"560m": 32, "1b7": 32, "3b": 32, "7b1": 16, "small": 4}
PEAK = 989e12
PARTS = ("theirs", "ours", "recompute", "packed", "forward", "profile", "shapes")
CATEGORIES = (  # the first whose pattern a kernel's name has
    ("attention", r"flex|flash|fmha"),
    ("matrix products", r"nvjet|gemm|cutlass|xmma|cublas|sm90"),
    ("optimizer", r"^update$|multi_tensor|lpnorm|l2norm"),
    ("gradient sums", r"vectorized_elementwise_kernel.*add|CUDAFunctor_add|direct_copy|FillFunctor|memset"),
    ("loss", r"^_statistics|^_to_gradient"),
    ("norms, GELU, residuals", r"triton_|^_gelu"),
    ("embedding", r"embedding|index|scatter|gather"),
    ("other", r""),
)


def settings(name: str, **changes) -> SFTConfig:
    values = dict(
        precision="bf16" if CUDA else "fp32",
        optimizer_precision="bf16" if CUDA else "fp32",
        micro_batch_size=ROWS[name][0],
        global_batch_size=GLOBAL_ROWS[name],
        seq_length=length(name),
        iterations=100,
        warmup_iterations=0,
        lr=1e-5,
    )
    return SFTConfig(paths=Paths("", "", "", "", ""), **values | changes)


def length(name: str) -> int:
    return 64 if name == "small" else 2048


def flops(shape: Shape, tokens: int, head: bool = True) -> float:
    """A token's in forward and backward; forward alone is a third. Attention reads half of the
    square."""
    matrices = 12 * shape.hidden**2 * shape.layers + (shape.vocab * shape.hidden if head else 0)
    return 6 * matrices + 6 * shape.layers * shape.hidden * tokens


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(function, warm: int, steps: int) -> float:
    """Median seconds."""
    seconds = []
    for number in range(warm + steps):
        sync()
        began = time.monotonic()
        function()
        sync()
        if number >= warm:
            seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def clean() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def random_tokens(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SHAPES[name].vocab, (GLOBAL_ROWS[name], length(name)), generator=generator)


def rows_of(name: str, packed: bool) -> Batch:
    """Whole rows with loss on every token; or documents of 220 tokens on average (log-normal, as
    HH's), loss on the last 40% of each."""
    tokens = random_tokens(name)
    if not packed:
        return {"tokens": tokens, "response_mask": torch.ones_like(tokens, dtype=torch.bool)}
    generator = torch.Generator().manual_seed(3)
    documents, mask = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for row in range(tokens.size(0)):
        start = number = 0
        while start < tokens.size(1):
            size = int(
                torch.randn((), generator=generator)
                .mul(0.7)
                .add(5.15)
                .exp()
                .clamp(8, 2048 if tokens.size(1) > 64 else 30)
            )
            documents[row, start : start + size], mask[row, start + max(int(0.6 * size), 1) : start + size] = (
                number,
                True,
            )
            start, number = start + size, number + 1
    return {"tokens": tokens, "response_mask": mask, "documents": documents}


def our_model(name: str, config: SFTConfig, head: str = "lm"):
    model = build_model(SHAPES[name], config, head)
    generator = torch.Generator(device=groups.device()).manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator) if parameter.dim() > 1 else parameter.fill_(
                float(key.endswith("weight"))
            )
    return model


def speed(name: str, seconds: float, peak: float, tokens: int, **more) -> dict:
    return {
        "model": name,
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(flops(SHAPES[name], length(name)) * tokens / seconds / PEAK, 4),
        "step_s": round(seconds, 4),
        "peak_gb": round(peak, 2),
        **more,
    }


def ours(name: str, packed: bool = False, recompute: str = "none") -> dict:
    clean()
    config = settings(name, recompute=recompute)
    began = time.monotonic()
    learner = Learner(our_model(name, config), config, config.lr, 100, 0)
    batch = rows_of(name, packed)
    micro_batches = [
        {key: values[first : first + config.micro_batch_size] for key, values in batch.items()}
        for first in range(0, GLOBAL_ROWS[name], config.micro_batch_size)
    ]
    objective, losses = Objective(("loss",), sft.compute), []

    def step():
        losses.append(learner.step(micro_batches, objective)["loss"])

    step()
    first = time.monotonic() - began
    clean_peak()
    seconds = timed(step, 1, 3)
    made = memory.estimate(SHAPES[name], config, 1).total - memory.OUTSIDE_GB
    result = speed(
        name,
        seconds,
        peak_gb(),
        batch["tokens"].numel(),
        rows=config.micro_batch_size,
        global_rows=GLOBAL_ROWS[name],
        estimate_gb=round(made, 2),
        first_step_s=round(first, 1),
        losses=[round(loss, 3) for loss in losses],
        part_with_loss=round(batch["response_mask"].float().mean().item(), 3),
    )
    if packed:
        del result["mfu"]  # short documents and tokens without loss need fewer FLOPs than it counts
    if packed or recompute != "none":
        return result
    return {**result, "learner": learner, "micro_batches": micro_batches, "objective": objective}


def clean_peak() -> None:
    if CUDA:
        torch.cuda.reset_peak_memory_stats()


def theirs(name: str) -> dict:
    from transformers import BloomConfig, BloomForCausalLM

    clean()
    shape, rows = SHAPES[name], ROWS[name][1]
    config = BloomConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, n_layer=shape.layers, n_head=shape.heads, use_cache=False
    )
    with torch.device(groups.device()):
        torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
        model = BloomForCausalLM._from_config(config, attn_implementation="eager")
        torch.set_default_dtype(torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=CUDA)
    tokens = random_tokens(name)
    losses = []

    def step():
        total = 0.0
        for part in tokens.to(groups.device()).split(rows):
            loss = model(input_ids=part, labels=part).loss * part.size(0) / tokens.size(0)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(total), 3))

    seconds = timed(step, 1, 2)
    return speed(name, seconds, peak_gb(), tokens.numel(), rows=rows, losses=losses)


def forward(name: str, head: str) -> dict:
    """Rows through the model alone: log-probabilities of all tokens ("lm"), or one number a token
    ("scalar")."""
    clean()
    config, shape = settings(name), SHAPES[name]
    model = our_model(name, config, head).requires_grad_(False)
    batch, rows = {"tokens": random_tokens(name)[:16]}, min(8, GLOBAL_ROWS[name])

    def read(output, micro):
        return next_token_logprobs(output, micro["tokens"]) if head == "lm" else output

    seconds = timed(lambda: evaluate(model, batch, rows, read), 2, 3)
    rate = flops(shape, length(name), head == "lm") / 3 * batch["tokens"].numel() / seconds
    return {
        "model": name,
        "head": head,
        "tokens_per_second": round(batch["tokens"].numel() / seconds),
        "tflops": round(rate / 1e12, 1),
        "of_matrix_product": round(rate / matrix_product(), 3),
        "peak_gb": round(peak_gb(), 2),
        "rows": rows,
    }


def matrix_product() -> float:
    """FLOP/s of a large bf16 product of random numbers."""
    size = 8192 if CUDA else 256
    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=groups.device()) for _ in range(2))
    return 2 * size**3 / timed(lambda: left @ right, 5, 20)


def profile(name: str, made: dict) -> dict:
    """One step: milliseconds of kernels by category, and of none."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    learner, part, objective, seconds = made["learner"], made["micro_batches"], made["objective"], made["step_s"]
    if not CUDA:
        return {"model": name, "step_ms": round(1e3 * seconds, 1)}
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        learner.step(part, objective)
        sync()
    kernels: dict[str, list] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time:
            kernels.setdefault(event.name, []).append(event.device_time / 1e3)
    sums = dict.fromkeys([category for category, _ in CATEGORIES], 0.0)
    for kernel, times in kernels.items():
        sums[next(category for category, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE))] += sum(
            times
        )
    largest = sorted(
        ((round(sum(times), 2), len(times), kernel[:110]) for kernel, times in kernels.items()), reverse=True
    )
    return {
        "model": name,
        "step_ms": round(1e3 * seconds, 1),
        "rows": GLOBAL_ROWS[name],
        "kernels_ms": {category: round(value, 1) for category, value in sums.items()},
        "idle_ms": round(1e3 * seconds - sum(sums.values()), 1),
        "count": sum(map(len, kernels.values())),
        "largest": largest[:40],
    }


def shapes(name: str, made: dict) -> dict:
    """A step as ``ours``, once rows of half the number and half the length have been seen."""
    learner, part, objective = made["learner"], made["micro_batches"], made["objective"]
    rows, tokens = part[0]["tokens"].shape
    learner.step([{key: values[: rows // 2, : tokens // 2] for key, values in part[0].items()}], objective)
    seconds = timed(lambda: learner.step(part, objective), 1, 3)
    return speed(name, seconds, peak_gb(), sum(micro["tokens"].numel() for micro in part), rows=rows)


def say(part: str, values: dict) -> None:
    print(json.dumps({"part": part, **values}), flush=True)


def one(name: str, parts: list[str]) -> None:
    """All parts of one model; one that fails does not end the others."""
    kept: dict = {}
    work = {
        "ours": lambda: (
            kept.update(ours(name))
            or {key: value for key, value in kept.items() if key not in ("learner", "micro_batches", "objective")}
        ),
        "profile": lambda: profile(name, kept),
        "shapes": lambda: shapes(name, kept),
        "packed": lambda: ours(name, packed=True),
        "recompute": lambda: ours(name, recompute="full"),
        "theirs": lambda: theirs(name),
    }
    with groups.ranks(1, 1, 1):
        for part in sorted(parts, key=["ours", "profile", "shapes", "packed", "forward", "theirs", "recompute"].index):
            if part not in ("ours", "profile", "shapes"):
                kept.clear()
            try:
                for values in [forward(name, "lm"), forward(name, "scalar")] if part == "forward" else [work[part]()]:
                    say(part, values)
            except Exception as error:  # noqa: BLE001 - one part's failure is told, and the rest still measured
                traceback.print_exc()
                say(part, {"model": name, "error": f"{type(error).__name__}: {error}"[:600]})


def table(rows: list[dict]) -> str:
    """Ours beside theirs."""
    lines = ["| model | | tokens/s | x theirs | MFU | peak GB | estimate |", "|---|---|---|---|---|---|---|"]
    speeds = {(row["model"], row["part"], row.get("head")): row for row in rows if "tokens_per_second" in row}
    for (model, part, _), row in speeds.items():
        his = speeds.get((model, "theirs", None))
        ratio = f"{row['tokens_per_second'] / his['tokens_per_second']:.2f}" if his and part != "forward" else ""
        mfu = f"{100 * row['mfu']:.1f}%" if "mfu" in row else ""
        if part == "forward":
            part, mfu = f"forward, {row['head']}", f"{100 * row['of_matrix_product']:.0f}% of a product"
        cells = (model, part, f"{row['tokens_per_second']:,}", ratio, mfu, row["peak_gb"], row.get("estimate_gb", ""))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["560m", "1b7", "3b", "7b1"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--logits", choices=("fp32", "bf16"), default="fp32", help="bf16: as they were, to see what fp32 ones cost"
    )
    parser.add_argument("--one", action="store_true", help="the one model in this process")
    parser.add_argument("--limit", type=int, default=600, help="most seconds a model")
    asked = parser.parse_args()
    if asked.out:
        asked.out.touch()  # a folder that is missing is said before the first part's minutes
    models = ["small"] if asked.small else asked.models
    if asked.one:
        if asked.logits == "bf16":
            chunked_logprobs.product = lambda hidden, weight: hidden @ weight.t()
        one(models[0], asked.parts)
        return 0
    rows = []
    for name in models:
        command = [
            sys.executable,
            __file__,
            "--one",
            *(["--small"] if asked.small else ["--models", name]),
            "--parts",
            *asked.parts,
            "--logits",
            asked.logits,
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            alarm = threading.Timer(asked.limit, process.kill)
            alarm.daemon = True  # an interrupt ends this process, too
            alarm.start()
            for line in process.stdout:
                print(line, end="", flush=True)
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    if asked.out:
                        with open(asked.out, "a", encoding="utf-8") as file:
                            file.write(line)
        alarm.cancel()
        if process.returncode:
            rows.append({"part": "process", "model": name, "error": f"exit code {process.returncode}"})
    print(table(rows))
    failed = [row for row in rows if "error" in row]
    print("\n".join(f"{row['model']} {row['part']}: {row['error']}" for row in failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
