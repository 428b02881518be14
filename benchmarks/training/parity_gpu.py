"""Is BLOOM on megatron-core right on a GPU, and what does it cost there? ``python
benchmarks/training/parity_gpu.py STEP ... [--folder DIR]``

    attention   every installed attention backend against fp64, forward and backward, plain, padded
                and packed rows, head dimensions of the published models; then loss and all
                gradients of a small model against Hugging Face in fp64, for each kind of recompute
                (3 minutes, most of it compiling)
    memory      torch.cuda.max_memory_allocated and tokens per second of SFT steps of bloom-560m and
                bloom-1b7 (5 minutes)
    make        a random bf16 model of the shape of --model (default bloom-7b1) as a Hugging Face
                folder below DIR (2 minutes, 14 GB)
    convert     that folder to Megatron, timed, with cp of the same bytes (needs 28 GB more for a
                while)
    logits      ours in bf16 and fp32, and Hugging Face in bf16, against Hugging Face in fp64 (57 GB
                on the GPU)
    export      back to Hugging Face, timed, every tensor compared bit for bit; deletes the Megatron
                checkpoint

Each prints JSON lines. A line with "ok": false is a missed tolerance, and the exit code is then 1.
``--small`` takes tiny shapes, to try the script on a CPU. Steps may run in separate calls; make,
convert, logits and export share DIR (default: a fixed folder of the temporary directory).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from benchmarks.common import missed, print_row, sft_config
from benchmarks.device import DEVICE, free_memory, peak_gb, reset_peak
from benchmarks.folders import copy, resident_children, size
from benchmarks.inputs import random_weights
from benchmarks.shapes import SHAPES
from tests.support.attention import document_ids, errors, relative
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import SFTConfig
from training.distributed import groups
from training.models import attention_backends
from training.models.heads import next_token_logprobs
from training.sft import compute
from training.trainer.step import Learner, Objective, build_model, evaluate

ROOT = Path(__file__).parents[2]
PUBLISHED = json.loads((ROOT / "tests" / "model_configs.json").read_text())
STEPS = ("attention", "memory", "make", "convert", "logits", "export")
SMALL = {
    "bloom": dict(vocab_size=300, n_embed=64, n_layer=4, num_attention_heads=4),
    "other": dict(vocab_size=300, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2),
}
"""What --small changes of a published shape."""
TOLERANCES = {torch.float32: (1e-5, 2e-5), torch.bfloat16: (1e-2, 2e-2)}
"""Relative L2 tolerances of an attention backend, forward and gradients: see
training.models.attention_backends."""


def settings(**values) -> SFTConfig:
    defaults = {"precision": "fp32", "micro_batch_size": 2, "global_batch_size": 4, "iterations": 10}
    return sft_config(**defaults | values)


def attention(folder: Path, small: bool) -> None:
    """The kernels against fp64, then a model against Hugging Face in fp64."""
    backends = [name for name in ("flash", "te") if attention_backends.available(name)]
    backends += ["flex", "sdpa"] if DEVICE == "cuda" else ["sdpa"]
    for name in backends:
        for dtype in TOLERANCES:
            if name not in attention_backends.PACKAGES or dtype != torch.float32:
                backend(name, dtype, small)
    with tempfile.TemporaryDirectory() as own:
        small_model(Path(own))


def backend(name: str, dtype: torch.dtype, small: bool) -> None:
    """One attention backend, with heads of the published models."""
    shapes = [(2, 128, 3, 16)] if small else [(2, 512, 14, 64), (2, 512, 8, 80), (1, 640, 16, 96), (1, 1024, 32, 128)]
    forward, gradient = TOLERANCES[dtype]
    for rows, length, heads, dim in shapes:
        for kind in ("plain", "padded", "packed"):
            ids = document_ids(kind, rows, length, DEVICE)
            off = errors(attention_backends.KERNELS[name], ids, rows, length, heads, dim, dtype, DEVICE)
            print_row(
                off[0] <= forward and off[1] <= gradient,
                step="attention",
                backend=name,
                dtype=str(dtype)[6:],
                heads=heads,
                head_dim=dim,
                length=length,
                rows=kind,
                forward=off[0],
                gradient=off[1],
            )


def small_model(folder: Path) -> None:
    """Loss and every gradient of a small model, padded and packed, in fp32 and bf16, each
    recompute, against Hugging Face in fp64."""
    shape = dict(vocab_size=1000, hidden_size=256, n_layer=4, n_head=8)
    model = random_model(AutoConfig.for_model("bloom", **shape), torch.float32, spread=0.15)
    model.save_pretrained(folder / "hf")
    convert_folder(folder, "hf")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1000, (4, 256), generator=generator)
    for kind in ("padded", "packed"):
        ids = document_ids(kind, 4, 256)
        # the first token of a document has nothing before it
        mask = torch.nn.functional.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
        exact = model.double().to(DEVICE)
        loss, gradients = hugging_face(exact, tokens, ids, mask)
        for dtype, recompute in (("fp32", "none"), ("fp32", "selective"), ("fp32", "full"), ("bf16", "none")):
            config = settings(precision=dtype, recompute=recompute)
            batch = {"tokens": tokens, "response_mask": mask, "documents": ids}
            our_loss, computed = our_gradients(folder, config, batch)
            worst, name = max((relative(computed[name], gradients[name]), name) for name in computed)
            least, most = (1e-5, 5e-5) if dtype == "fp32" else (5e-3, 0.25)
            print_row(
                abs(our_loss - loss) <= least * loss and worst <= most,
                step="model",
                dtype=dtype,
                recompute=recompute,
                rows=kind,
                loss=abs(our_loss - loss) / loss,
                worst_gradient=worst,
                of=name,
            )


def hugging_face(model, tokens, ids, mask) -> tuple[float, dict]:
    """Mean loss over ``mask`` and its gradients; each document passes the model on its own."""
    model.zero_grad()
    total = 0.0
    for row, owner, inside in zip(tokens, ids, mask, strict=True):
        for document in owner.unique():
            chosen = (owner == document).nonzero().squeeze(1)
            if len(chosen) < 2:
                continue
            inputs = row[chosen][None].to(DEVICE)
            logprobs = (
                model(input_ids=inputs).logits[0, :-1].log_softmax(-1).gather(-1, inputs[0, 1:, None]).squeeze(-1)
            )
            loss = -(logprobs * inside[chosen][1:].to(DEVICE)).sum() / mask.sum()
            loss.backward()
            total += loss.item()
    return total, {
        name.removeprefix("transformer."): parameter.grad.clone() for name, parameter in model.named_parameters()
    }


def our_gradients(folder: Path, config: SFTConfig, batch: dict) -> tuple[float, dict]:
    """The mean loss and its gradients by Hugging Face name (one rank)."""
    from conversion.weights import entries

    shape = Shape.read(folder / "hf")
    model = build_model(shape, config, "lm")
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
    learner = Learner(model, config, config.lr, 10, 0)
    learner.optimizer.update = lambda norm: None  # gradients only
    halves = [{name: tensor[first : first + 2] for name, tensor in batch.items()} for first in (0, 2)]
    loss = learner.step(halves, Objective(("loss",), compute))["loss"]
    names = {entry.parameter: entry.name for entry in entries(shape)}
    scale = learner.optimizer.scale
    gradients = {names[name]: parameter.main_grad * scale for name, parameter in model.named_parameters()}
    gradients["word_embeddings.weight"] = gradients["word_embeddings.weight"][: shape.vocab]
    return loss, gradients


def published(name: str, small: bool) -> PreTrainedConfig:
    """The configuration of a model in tests/model_configs.json, or a small one of its family."""
    skipped = ("parameters", "bos_token_id", "eos_token_id")  # no tokenizer comes with it
    values = {key: value for key, value in PUBLISHED[name].items() if key not in skipped}
    family = values.pop("model_type")
    if family == "bloom":
        values["vocab_size"] = 250880
    values |= {"bos_token_id": None, "eos_token_id": None}
    return AutoConfig.for_model(family, **values | (SMALL.get(family, SMALL["other"]) if small else {}))


def random_model(config: PreTrainedConfig, dtype: torch.dtype, spread: float = 0.02) -> torch.nn.Module:
    """A seeded random model on the GPU with noisy biases and norms."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            for name in ("hidden_dropout", "attention_dropout"):
                setattr(config, name, 0.0)
            config.initializer_range, config.use_cache = spread, False
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def memory(folder: Path, small: bool) -> None:
    """Peak memory of the second SFT step (the first makes Adam's moments) and its speed, TP 1,
    bf16, row length 2048."""
    length = 64 if small else 2048
    for name in ("small",) if small else ("560m", "1b7"):
        shape = SHAPES[name]
        for rows in (1, 4):
            for recompute in ("none", "selective", "full"):
                free_memory()
                config = settings(precision="bf16", recompute=recompute, micro_batch_size=rows, global_batch_size=rows)
                print_row(
                    step="memory",
                    model=name,
                    parameters=shape.parameters(),
                    rows=rows,
                    length=length,
                    recompute=recompute,
                    **one_step(shape, config, rows, length),
                )


def one_step(shape: Shape, config: SFTConfig, rows: int, length: int) -> dict:
    torch.manual_seed(0)
    model = build_model(shape, config, "lm")
    random_weights(model, seed=0)
    learner = Learner(model, config, 1e-5, 10, 0)
    tokens = torch.randint(0, shape.vocab, (rows, length))
    batch = {"tokens": tokens, "response_mask": torch.ones_like(tokens, dtype=torch.bool)}
    seconds, losses = [], []
    for _ in range(4):
        if len(seconds) == 1:
            reset_peak()
        began = time.monotonic()
        losses.append(learner.step([batch], Objective(("loss",), compute))["loss"])
        seconds.append(time.monotonic() - began)
    static = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
    return {
        "peak_gb": peak_gb(),
        "static_gb": static / 1e9,
        "tokens_per_second": rows * length / sorted(seconds)[1],
        "loss": losses[-1],
    }


def make(folder: Path, small: bool, name: str = "bloom-7b1") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    model = random_model(published(name, small), torch.bfloat16)
    model.save_pretrained(folder / "hf", max_shard_size="5GB")
    print_row(
        step="make",
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gigabytes=size(folder / "hf"),
        seconds=time.monotonic() - began,
    )


def stage(module: str, folder: Path, name: str, **config) -> tuple[float, float]:
    """Run a conversion stage as a user would -> (seconds, peak resident memory of it and its
    children, GB; file pages included)."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    os.sync()
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", module, str(path)], check=True, cwd=ROOT, env={**os.environ, "MASTER_PORT": "29501"}
    )
    os.sync()
    return time.monotonic() - began, resident_children()


def convert_folder(folder: Path, source: str) -> tuple[float, float]:
    target = folder / "convert"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    return stage(
        "conversion.hf_to_megatron", folder, "convert", paths={"output": str(target), "model": str(folder / source)}
    )


def convert(folder: Path, small: bool) -> None:
    cp = copy(folder / "hf", folder / "copy")
    seconds, resident = convert_folder(folder, "hf")
    again = copy(folder / "hf", folder / "copy")
    fastest, gigabytes = min(cp, again), size(folder / "hf")
    print_row(
        step="convert",
        gigabytes=gigabytes,
        seconds=seconds,
        cp_seconds=[round(cp, 2), round(again, 2)],
        times_cp=seconds / fastest,
        gb_per_second=gigabytes / seconds,
        max_rss_gb=resident,
    )


def export(folder: Path, small: bool) -> None:
    target = folder / "export"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    paths = {"output": str(target), "model": str(folder / "hf"), "checkpoints": {"sft": str(folder / "convert")}}
    seconds, resident = stage("conversion.megatron_to_hf", folder, "export", paths=paths)
    wrong, count = differences(folder / "hf", target / "sft")
    shutil.rmtree(folder / "convert")  # room on the disk for the copy
    gigabytes = size(target / "sft")
    cp = copy(target / "sft", folder / "copy")
    print_row(
        not wrong,
        step="export",
        gigabytes=gigabytes,
        seconds=seconds,
        cp_seconds=cp,
        times_cp=seconds / cp,
        gb_per_second=gigabytes / seconds,
        max_rss_gb=resident,
        tensors=count,
        different=wrong[:5],
    )


def differences(left: Path, right: Path) -> tuple[list[str], int]:
    """Names whose tensors are not the same bits in both folders, and how many there are."""

    def tensors(folder):
        from safetensors import safe_open

        by_name = {}
        for path in sorted(folder.glob("*.safetensors")):
            handle = safe_open(path, "pt")
            names = handle.keys()  # noqa: SIM118 - a handle is no mapping
            by_name |= {name.removeprefix("transformer."): (handle, name) for name in names if name not in copies}
        return by_name

    copies = ("lm_head.weight",) if Shape.read(left).tied else ()  # of a tied embedding
    before, after = tensors(left), tensors(right)
    wrong = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        a, b = (handle.get_tensor(stored) for handle, stored in (before[name], after[name]))
        if a.dtype != b.dtype or not torch.equal(a, b):
            wrong.append(name)
    return wrong, len(before)


def logits(folder: Path, small: bool) -> None:
    """Logits of 2 rows against Hugging Face in fp64.

    Tolerances: in fp32 2e-5 relative (L2), the rounding of 30 layers. In bf16 no absolute number
    means anything for a random model: ours may be at most a tenth farther from fp64 than Hugging
    Face's own bf16. The two differ from each other by about the root of the sum of squares, because
    they round in different places (Hugging Face also rounds ALiBi itself).
    """
    shape = Shape.read(folder / "hf")
    rows, length = 2, 128 if small else 256
    tokens = torch.randint(0, shape.vocab, (rows, length), generator=torch.Generator().manual_seed(5))
    exact, rounded = (hugging_face_logits(folder, tokens, dtype) for dtype in (torch.float64, torch.bfloat16))
    half, single = (our_logits(folder, shape, tokens, precision) for precision in ("bf16", "fp32"))
    fp32, bf16, peer = relative(single, exact), relative(half, exact), relative(rounded, exact)

    def closeness(logits):
        return {
            "same_argmax": round((logits.argmax(-1) == exact.argmax(-1)).float().mean().item(), 4),
            "largest_difference": round((logits.double() - exact).abs().max().item(), 4),
        }

    print_row(
        fp32 <= 2e-5 and bf16 <= 1.1 * peer,
        step="logits",
        ours_fp32=fp32,
        ours_bf16=bf16,
        hf_bf16=peer,
        ours_to_hf_bf16=relative(half, rounded),
        largest_logit=exact.abs().max().item(),
        ours=closeness(half),
        hf=closeness(rounded),
    )


def hugging_face_logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Hugging Face's logits (B, T, V) on the CPU."""
    free_memory()
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.bfloat16).to(DEVICE).to(dtype).eval()
    with torch.no_grad():
        return model(input_ids=tokens.to(DEVICE)).logits.cpu()


def our_logits(folder: Path, shape: Shape, tokens: torch.Tensor, precision: str) -> torch.Tensor:
    """Our logits (B, T, V) on the CPU."""
    free_memory()
    model = build_model(shape, settings(precision=precision), "lm")
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
    parts = []

    def read(output, micro):
        parts.append(output.logits()[..., : shape.vocab].float().cpu())
        return next_token_logprobs(output, micro["tokens"])

    evaluate(model, {"tokens": tokens}, 2, read)
    return torch.cat(parts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "convoy-parity")
    parser.add_argument("--model", choices=PUBLISHED, default="bloom-7b1", help="whose shape the step make takes")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    print_row(torch=torch.__version__, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")
    steps = (attention, memory, functools.partial(make, name=options.model), convert, logits, export)
    run = dict(zip(STEPS, steps, strict=True))
    with groups.ranks(1, 1, seed=1):
        for step in options.steps:
            began = time.monotonic()
            run[step](options.folder, options.small)
            free_memory()
            print_row(step=step, took=time.monotonic() - began)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
