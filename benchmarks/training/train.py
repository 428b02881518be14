"""How fast is training, compared with Hugging Face's BLOOM? ``python benchmarks/training/train.py
[--models 560m 1b7 3b 7b1] [--out FILE]``

One GPU, random bf16 weights, each model in a process of its own:

    theirs    Hugging Face BLOOM as TRL would run it: eager attention (it has no other), gradient
              checkpointing, torch's fused AdamW on bf16 weights (8 bytes of weights, gradients and
              moments a parameter), gradients clipped
    ours      the SFT trainer's step, optimizer included: the same tokens, loss on all of them,
              optimizer_precision "bf16" (12 bytes)
    recompute ours with recompute = "full", for the memory
    packed    ours with rows of documents as long as Anthropic HH's, loss on the last 40% of each,
              as SFT has them on real data
    forward   PPO's passes: log-probabilities, reward or values
    profile   kernels of a step by what they do
    shapes    ours with kernels for any number and length of rows, which packed rows get from their
              second shape on

Prints JSON lines and a table: tokens/s, MFU (benchmarks/shapes.py has its FLOPs), peak memory
(torch.cuda.max_memory_allocated), launcher/estimates/memory.py's estimate of it, and for
``forward`` the share of a matrix product's rate, measured in the same process. ``--small``: tiny
shapes, also on a CPU, where the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import print_row, run_part, sft_config
from benchmarks.device import CUDA, PRECISION, free_memory, median_seconds, peak_gb, reset_peak, synchronize
from benchmarks.inputs import packed_documents, random_weights
from benchmarks.shapes import PEAK_FLOPS, SHAPES, flops_per_token
from launcher.estimates import memory
from training import sft
from training.config.trainers import SFTConfig
from training.distributed import groups
from training.models import chunked_logprobs
from training.models.heads import next_token_logprobs
from training.trainer.step import Batch, Learner, Objective, build_model, evaluate

ROWS = {"560m": (16, 8), "1b7": (16, 4), "3b": (8, 4), "7b1": (4, 4), "small": (2, 2)}
"""Rows of a micro-batch: ours, theirs (as many as fit, and no more than make it faster)."""
GLOBAL_ROWS = {"560m": 32, "1b7": 32, "3b": 32, "7b1": 16, "small": 4}
PARTS = ("ours", "profile", "shapes", "packed", "forward", "theirs", "recompute")
"""In the order in which they run: those that need the learner of "ours" follow it."""
NEED_LEARNER = ("profile", "shapes")
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
    values = {
        "precision": PRECISION,
        "optimizer_precision": PRECISION,
        "micro_batch_size": ROWS[name][0],
        "global_batch_size": GLOBAL_ROWS[name],
        "seq_length": length(name),
        "iterations": 100,
    }
    return sft_config(**values | changes)


def length(name: str) -> int:
    """Tokens of a row."""
    return 64 if name == "small" else 2048


def random_tokens(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SHAPES[name].vocab, (GLOBAL_ROWS[name], length(name)), generator=generator)


def rows_of(name: str, packed: bool) -> Batch:
    """Whole rows with loss on every token, or packed documents with loss on the last 40% of
    each."""
    tokens = random_tokens(name)
    if not packed:
        return {"tokens": tokens, "response_mask": torch.ones_like(tokens, dtype=torch.bool)}
    documents, mask = packed_documents(*tokens.shape, torch.Generator().manual_seed(3))
    return {"tokens": tokens, "response_mask": mask, "documents": documents}


def random_model(name: str, config: SFTConfig, head: str = "lm"):
    model = build_model(SHAPES[name], config, head)
    random_weights(model, seed=1)
    return model


def speed(name: str, seconds: float, tokens: int, **more) -> dict:
    """The row of a step of ``tokens`` tokens."""
    return {
        "model": name,
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(flops_per_token(SHAPES[name], length(name)) * tokens / seconds / PEAK_FLOPS, 4),
        "step_s": round(seconds, 4),
        "peak_gb": round(peak_gb(), 2),
        **more,
    }


class SftStep:
    """The SFT trainer's step on the same rows again and again."""

    def __init__(self, name: str, packed: bool = False, recompute: str = "none"):
        free_memory()
        self.name, self.config = name, settings(name, recompute=recompute)
        began = time.monotonic()
        self.learner = Learner(random_model(name, self.config), self.config, self.config.lr, 100, 0)
        self.batch, rows = rows_of(name, packed), self.config.micro_batch_size
        self.micro_batches = [
            {key: values[first : first + rows] for key, values in self.batch.items()}
            for first in range(0, GLOBAL_ROWS[name], rows)
        ]
        self.objective, self.losses = Objective(("loss",), sft.compute), []
        self.step()
        self.first_step_s = time.monotonic() - began
        """With building the model and compiling."""

    def step(self) -> None:
        self.losses.append(self.learner.step(self.micro_batches, self.objective)["loss"])

    def measure(self) -> dict:
        """The row of the step."""
        reset_peak()
        seconds = median_seconds(self.step, 1, 3)
        return speed(
            self.name,
            seconds,
            self.batch["tokens"].numel(),
            rows=self.config.micro_batch_size,
            global_rows=GLOBAL_ROWS[self.name],
            estimate_gb=round(memory.estimate(SHAPES[self.name], self.config, 1).total - memory.OUTSIDE_GB, 2),
            first_step_s=round(self.first_step_s, 1),
            losses=[round(loss, 3) for loss in self.losses],
            part_with_loss=round(self.batch["response_mask"].float().mean().item(), 3),
        )


def packed_step(name: str) -> dict:
    """The step on packed rows. It has no MFU: short documents and tokens without loss need fewer
    FLOPs than the formula counts."""
    row = SftStep(name, packed=True).measure()
    del row["mfu"]
    return row


def hugging_face_step(name: str) -> dict:
    from transformers import BloomConfig, BloomForCausalLM

    free_memory()
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

    seconds = median_seconds(step, 1, 2)
    return speed(name, seconds, tokens.numel(), rows=rows, losses=losses)


def forward(name: str, head: str) -> dict:
    """Rows through the model alone: log-probabilities of all tokens ("lm"), or one number a token
    ("scalar")."""
    free_memory()
    config, shape = settings(name), SHAPES[name]
    model = random_model(name, config, head).requires_grad_(False)
    batch, rows = {"tokens": random_tokens(name)[:16]}, min(8, GLOBAL_ROWS[name])

    def read(output, micro):
        return next_token_logprobs(output, micro["tokens"]) if head == "lm" else output

    seconds = median_seconds(lambda: evaluate(model, batch, rows, read), 2, 3)
    rate = flops_per_token(shape, length(name), head == "lm") / 3 * batch["tokens"].numel() / seconds
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
    return 2 * size**3 / median_seconds(lambda: left @ right, 5, 20)


def profile(name: str, step: SftStep, seconds: float) -> dict:
    """One step of ``seconds``: milliseconds of kernels by category, and without a kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    if not CUDA:
        return {"model": name, "step_ms": round(1e3 * seconds, 1)}
    with profiler(activities=[ProfilerActivity.CUDA]) as trace:
        step.step()
        synchronize()
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.device_time:
            kernels.setdefault(event.name, []).append(event.device_time / 1e3)
    sums = dict.fromkeys([category for category, _ in CATEGORIES], 0.0)
    for kernel, times in kernels.items():
        sums[category_of(kernel)] += sum(times)
    largest = [(round(sum(times), 2), len(times), kernel[:110]) for kernel, times in kernels.items()]
    return {
        "model": name,
        "step_ms": round(1e3 * seconds, 1),
        "rows": GLOBAL_ROWS[name],
        "kernels_ms": {category: round(value, 1) for category, value in sums.items()},
        "idle_ms": round(1e3 * seconds - sum(sums.values()), 1),
        "count": sum(map(len, kernels.values())),
        "largest": sorted(largest, reverse=True)[:40],
    }


def category_of(kernel: str) -> str:
    return next(category for category, pattern in CATEGORIES if re.search(pattern, kernel, re.IGNORECASE))


def any_shape_step(name: str, step: SftStep) -> dict:
    """The step once rows of half the number and half the length have been compiled, too."""
    first = step.micro_batches[0]
    rows, tokens = first["tokens"].shape
    step.learner.step([{key: values[: rows // 2, : tokens // 2] for key, values in first.items()}], step.objective)
    seconds = median_seconds(step.step, 1, 3)
    return speed(name, seconds, sum(micro["tokens"].numel() for micro in step.micro_batches), rows=rows)


def run_model(name: str, parts: list[str]) -> None:
    """All parts of one model; one that fails does not end the others."""
    step: SftStep | None = None
    step_s = 0.0
    with groups.ranks(1, 1, 1):
        for part in sorted(parts, key=PARTS.index):
            if part not in NEED_LEARNER:
                step = None
            try:
                if part == "ours":
                    step = SftStep(name)
                    rows = [step.measure()]
                    step_s = rows[0]["step_s"]
                elif part == "profile":
                    rows = [profile(name, step, step_s)]
                elif part == "shapes":
                    rows = [any_shape_step(name, step)]
                elif part == "packed":
                    rows = [packed_step(name)]
                elif part == "forward":
                    rows = [forward(name, "lm"), forward(name, "scalar")]
                elif part == "theirs":
                    rows = [hugging_face_step(name)]
                else:
                    rows = [SftStep(name, recompute="full").measure()]
                for row in rows:
                    print_row(part=part, **row)
            except Exception as error:  # noqa: BLE001 - the other parts are still measured
                traceback.print_exc()
                print_row(part=part, model=name, error=f"{type(error).__name__}: {error}"[:600])


def table(rows: list[dict]) -> str:
    """All speeds, and their ratio to Hugging Face's."""
    lines = ["| model | | tokens/s | x theirs | MFU | peak GB | estimate |", "|---|---|---|---|---|---|---|"]
    speeds = {(row["model"], row["part"], row.get("head")): row for row in rows if "tokens_per_second" in row}
    for (model, part, _), row in speeds.items():
        peer = speeds.get((model, "theirs", None))
        ratio = f"{row['tokens_per_second'] / peer['tokens_per_second']:.2f}" if peer and part != "forward" else ""
        mfu = f"{100 * row['mfu']:.1f}%" if "mfu" in row else ""
        if part == "forward":
            part, mfu = f"forward, {row['head']}", f"{100 * row['of_matrix_product']:.0f}% of a product"
        cells = (model, part, f"{row['tokens_per_second']:,}", ratio, mfu, row["peak_gb"], row.get("estimate_gb", ""))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ROWS, default=["560m", "1b7", "3b", "7b1"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--logits", choices=("fp32", "bf16"), default="fp32", help="bf16: shows what logits in fp32 cost"
    )
    parser.add_argument("--one", action="store_true", help="the one model in this process")
    parser.add_argument("--limit", type=int, default=600, help="most seconds a model")
    options = parser.parse_args()
    if options.out:
        options.out.touch()  # a missing folder is an error before the first part's minutes
    models = ["small"] if options.small else options.models
    if options.one:
        if options.logits == "bf16":
            chunked_logprobs.product = lambda hidden, weight: hidden @ weight.t()
        run_model(models[0], options.parts)
        return 0
    rows = []
    for name in models:
        size = ["--small"] if options.small else ["--models", name]
        arguments = ["--one", *size, "--parts", *options.parts, "--logits", options.logits]
        printed, code = run_part(__file__, arguments, options.limit, options.out)
        rows += printed
        if code:
            rows.append({"part": "process", "model": name, "error": f"exit code {code}"})
    print(table(rows))
    failed = [row for row in rows if "error" in row]
    print("\n".join(f"{row['model']} {row['part']}: {row['error']}" for row in failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
