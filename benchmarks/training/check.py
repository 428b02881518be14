"""Do the fast paths compute what the plain ones do? ``python benchmarks/training/check.py``: on a
GPU, in about two minutes; tiny on a CPU.

    layers     a small BLOOM with compiled layers and FlexAttention against the same in fp32 with
               nothing compiled and SDPA: loss and every
               parameter's gradient, each kind of recompute, whole and packed rows, fp32 and bf16
               (and bf16 with nothing compiled)
    gelu       its backward kernel against fp64
    head       log-probabilities, entropies, sums and their gradients in chunks against fp64,
               BLOOM's vocabulary
    optimizer  the Triton kernel against the same step in torch; fp32 AdamW's losses beside
               optimizer_precision "bf16"'s

One JSON line each, errors as relative L2; "ok": false is a missed tolerance, and the exit code is
1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from benchmarks.common import missed, print_row, sft_config
from benchmarks.device import CUDA
from tests.support.attention import document_ids, relative
from training import sft
from training.config.trainers import SFTConfig
from training.distributed import groups
from training.models import heads
from training.models.bloom.table import shape as bloom
from training.models.chunked_logprobs import Columns
from training.models.gelu import gelu_backward
from training.models.language_model import model_chunks
from training.optim import adamw
from training.trainer.step import Learner, Objective, build_model

VOCAB = 5000 if CUDA else 500
LAYERS, HIDDEN = (4, 512) if CUDA else (2, 64)
SHAPES = {kind: bloom(LAYERS, HIDDEN, heads, VOCAB, 1e-5) for kind, heads in (("whole", 4), ("packed", 8))}
"""Heads of 128 dimensions and of 64: FlexAttention's tiles differ."""
LENGTH = 512 if CUDA else 128


def settings(**values) -> SFTConfig:
    defaults = {"precision": "fp32", "micro_batch_size": 2, "global_batch_size": 4, "iterations": 1000, "lr": 1e-3}
    return sft_config(**defaults | values)


def random_learner(config: SFTConfig, kind: str) -> Learner:
    """Of SHAPES[kind], with noisy biases and norms."""
    model, generator = build_model(SHAPES[kind], config, "lm"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + (parameter.dim() == 1))
    return Learner(model, config, config.lr, 1000, 0)


def batch(kind: str, seed: int = 0) -> list[dict]:
    """Two micro-batches of two rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = document_ids("packed", 4, LENGTH)
    rows = {
        "tokens": torch.randint(0, VOCAB, (4, LENGTH), generator=generator),
        "response_mask": F.pad(ids[:, 1:] == ids[:, :-1], (1, 0)),
    }
    if kind == "packed":
        rows["documents"] = ids
    return [{name: values[part] for name, values in rows.items()} for part in (slice(0, 2), slice(2, 4))]


def gradients(config: SFTConfig, kind: str) -> tuple[float, dict]:
    """The loss of a step, and the gradient of each parameter by its name."""
    learner = random_learner(config, kind)
    optimizer = learner.optimizer
    optimizer.update = lambda norm: None
    loss = learner.step(batch(kind), Objective(("loss",), sft.compute))["loss"]
    return loss, {
        name: parameter.main_grad.double() * optimizer.scale
        for part in model_chunks(learner.model)
        for name, parameter in part.named_parameters()
    }


def layers(kinds: list[str]) -> None:
    for kind in kinds:
        variants = (
            [("fp32", "none"), ("bf16", "none"), ("bf16", "full")]
            if kind == "whole"
            else [("fp32", "none"), ("fp32", "selective"), ("bf16", "none"), ("bf16", "selective")]
        )
        exact_loss, exact = gradients(settings(attention="sdpa", compile=False), kind)
        fast = [dict(zip(("precision", "recompute"), variant, strict=True)) for variant in variants]
        for values in [dict(precision="bf16", attention="sdpa", compile=False), *fast]:
            loss, computed = gradients(settings(**values), kind)
            errors = {name: relative(computed[name], exact[name]) for name in exact}
            worst = max(errors, key=errors.get)
            median = sorted(errors.values())[len(errors) // 2]
            least, most, middle = (1e-6, 5e-5, 1e-5) if values["precision"] == "fp32" else (2e-3, 0.3, 0.06)
            off = abs(loss - exact_loss) / exact_loss
            print_row(
                off <= least and errors[worst] <= most and median <= middle,
                check="layers",
                rows=kind,
                loss=off,
                worst_gradient=errors[worst],
                of=worst,
                median_gradient=median,
                **values,
            )


def head() -> None:
    """Readers of the head on one rank's columns, against fp64."""
    from megatron.core import parallel_state

    columns, hidden_size, length = (250880, 1024, 3000) if CUDA else (500, 32, 40)
    device, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    all_columns = Columns(0, columns - 100, parallel_state.get_tensor_model_parallel_group())
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
        weight = torch.randn(columns, hidden_size, device=device, generator=generator) * 0.1
        weight = weight.to(dtype).requires_grad_()
        hidden = torch.randn(length, 2, hidden_size, device=device, generator=generator).to(dtype).requires_grad_()
        tokens = torch.randint(0, all_columns.real, (2, length), device=device, generator=generator)
        mask = torch.rand(2, length, device=device, generator=generator) < 0.4
        factors = torch.randn(2, length, device=device, generator=generator)
        output = heads.Output(hidden, weight, all_columns, False)
        for reader in ("logprobs and entropy", "nll"):
            if reader == "nll":
                loss = heads.next_token_nll(output, tokens, mask)
            else:
                logprobs, entropy = heads.next_token_logprobs_and_entropy(output, tokens, 0.8, mask)
                loss = (logprobs * factors + 0.5 * entropy).sum()
            computed = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
            exact = exact_head(reader, hidden, weight, all_columns.real, tokens, mask, factors)
            errors = [relative(value, expected) for value, expected in zip(computed, exact, strict=True)]
            print_row(
                max(errors) <= bound,
                check="head",
                reader=reader,
                dtype=str(dtype)[6:],
                loss=float(errors[0]),
                of_hidden=float(errors[1]),
                of_weight=float(errors[2]),
            )


def gelu() -> None:
    """Rows and columns that fill no tile of the kernel, and 1b7's."""
    device, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    for rows, columns, dtype in (
        (777, 1030, torch.float32),
        (32768 if CUDA else 512, 8192 if CUDA else 64, torch.bfloat16),
    ):
        inputs, grad = (torch.randn(rows, columns, device=device, generator=generator).to(dtype) * 2 for _ in range(2))
        bias = torch.randn(columns, device=device, generator=generator).to(dtype)
        computed = gelu_backward(grad, inputs, bias)
        errors = []
        # in halves: fp64 takes much memory
        for part in (slice(0, columns // 2), slice(columns // 2, columns)):
            exact = [inputs[:, part].double().requires_grad_(), bias[part].double().requires_grad_()]
            F.gelu(exact[0] + exact[1], approximate="tanh").backward(grad[:, part].double())
            pairs = zip(computed, exact, strict=True)
            errors.append([float(relative(value[..., part], expected.grad)) for value, expected in pairs])
        worst = [max(error) for error in zip(*errors, strict=True)]
        print_row(
            max(worst) <= (1e-6 if dtype == torch.float32 else 4e-3),
            check="gelu",
            dtype=str(dtype)[6:],
            of_inputs=worst[0],
            of_bias=worst[1],
        )


def exact_head(reader, hidden, weight, real, tokens, mask, factors):
    """(loss, gradients) in fp64, 64 predictions at a time."""
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    row, t = mask[:, 1:].nonzero(as_tuple=True)
    total = 0.0
    for part in torch.arange(row.numel(), device=row.device).split(64):
        logits = hidden64[t[part], row[part]] @ weight64[:real].T / (1.0 if reader == "nll" else 0.8)
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, tokens[row[part], t[part] + 1][:, None]).squeeze(-1)
        loss = (
            -chosen.sum()
            if reader == "nll"
            else (chosen * factors[row[part], t[part] + 1]).sum() - 0.5 * (logp.exp() * logp).sum()
        )
        loss.backward()
        total += loss.detach()
    return [total, hidden64.grad, weight64.grad]


def optimizer() -> None:
    """The kernel of AdamW against plain torch, and training with bf16 state against fp32."""
    optimizer_kernel()
    losses = {}
    for precision in ("fp32", "bf16"):
        config = settings(precision="bf16", optimizer_precision=precision, lr=1e-3, schedule="constant")
        learner, objective = random_learner(config, "packed"), Objective(("loss",), sft.compute)
        losses[precision] = [learner.step(batch("packed", step % 8), objective)["loss"] for step in range(40)]
    off = max(abs(bf16 - fp32) / fp32 for bf16, fp32 in zip(losses["bf16"], losses["fp32"], strict=True))
    print_row(
        off <= 0.01 and losses["bf16"][-1] < losses["bf16"][0] - 0.2,
        check="optimizer",
        largest_difference=off,
        fp32=losses["fp32"][::13],
        bf16=losses["bf16"][::13],
    )


def optimizer_kernel() -> None:
    """Three steps of the same state by both."""
    device, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    state = None
    for step in range(1, 4):
        grad = torch.randn(100_003, device=device, generator=generator) * 0.1
        if state is None:
            weight = torch.randn(100_003, device=device, generator=generator).bfloat16()
            state = [
                [
                    weight.clone(),
                    torch.zeros_like(weight, dtype=torch.int16),
                    torch.zeros_like(weight),
                    torch.zeros_like(weight),
                ]
                for _ in range(2)
            ]
        arguments = (
            torch.tensor(0.7, device=device),
            1e-3 / (1 - 0.9**step),
            0.9,
            0.999,
            1e-8,
            1 - 1e-4,
            (1 - 0.999**step) ** -0.5,
            adamw.mixed(step),
            2**31 - 50_000,
        )
        for update, tensors in zip((adamw.update_, adamw._on_gpu if CUDA else adamw.update_), state, strict=True):
            update(*tensors, grad, *arguments)
    plain, kernel = (adamw.joined(*tensors[:2]) for tensors in state)
    same = (state[0][3] == state[1][3]).float().mean().item()
    error = relative(kernel - weight.float().mean(), plain - weight.float().mean())
    print_row(
        float(error) <= 1e-6 and same >= 0.999, check="optimizer kernel", weights=float(error), same_second_moments=same
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=["head", "gelu", "optimizer", "layers"])
    parser.add_argument(
        "--rows", nargs="+", choices=("whole", "packed"), default=["whole", "packed"], help="of the layers' check"
    )
    options = parser.parse_args()
    with groups.ranks(1, 1, 1):
        for name in options.checks:
            try:
                {"head": head, "gelu": gelu, "optimizer": optimizer, "layers": lambda: layers(options.rows)}[name]()
            except Exception as error:  # noqa: BLE001 - the other checks still run
                traceback.print_exc()
                print_row(False, check=name, error=f"{type(error).__name__}: {error}"[:800])
    sys.exit(int(bool(missed)))
