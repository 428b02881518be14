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

from benchmarks.common import missed, say
from tests.support.attention import document_ids, relative
from training import sft
from training.config.trainers import Paths, SFTConfig
from training.distributed import groups
from training.models import heads
from training.models.bloom.table import shape as bloom
from training.models.chunked_logprobs import Columns
from training.models.gelu import gelu_backward
from training.models.language_model import model_chunks
from training.optim import adamw
from training.trainer.step import Learner, Objective, build_model

CUDA = torch.cuda.is_available()
VOCAB = 5000 if CUDA else 500
LAYERS, HIDDEN = (4, 512) if CUDA else (2, 64)
SHAPES = {kind: bloom(LAYERS, HIDDEN, heads, VOCAB, 1e-5) for kind, heads in (("whole", 4), ("packed", 8))}
"""Heads of 128 dimensions and of 64: FlexAttention's tiles differ."""
LENGTH = 512 if CUDA else 128


def settings(**values) -> SFTConfig:
    defaults = dict(
        precision="fp32", micro_batch_size=2, global_batch_size=4, iterations=1000, warmup_iterations=0, lr=1e-3
    )
    return SFTConfig(paths=Paths("", "", "", "", ""), **{**defaults, **values})


def learner(config: SFTConfig, kind: str) -> Learner:
    model, generator = build_model(SHAPES[kind], config, "lm"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05 + (parameter.dim() == 1))
    return Learner(model, config, config.lr, 1000, 0)


def batch(kind: str, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = document_ids("packed", 4, LENGTH)
    made = {
        "tokens": torch.randint(0, VOCAB, (4, LENGTH), generator=generator),
        "response_mask": F.pad(ids[:, 1:] == ids[:, :-1], (1, 0)),
    }
    if kind == "packed":
        made["documents"] = ids
    return [{name: values[rows] for name, values in made.items()} for rows in (slice(0, 2), slice(2, 4))]


def gradients(config: SFTConfig, kind: str) -> tuple[float, dict]:
    made = learner(config, kind)
    made.optimizer.update = lambda norm: None
    loss = made.step(batch(kind), Objective(("loss",), sft.compute))["loss"]
    scale = made.optimizer.scale
    return loss, {
        name: parameter.main_grad.double() * scale
        for part in model_chunks(made.model)
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
            loss, found = gradients(settings(**values), kind)
            errors = {name: relative(found[name], exact[name]) for name in exact}
            worst = max(errors, key=errors.get)
            median = sorted(errors.values())[len(errors) // 2]
            least, most, middle = (1e-6, 5e-5, 1e-5) if values["precision"] == "fp32" else (2e-3, 0.3, 0.06)
            off = abs(loss - exact_loss) / exact_loss
            say(
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
    columns, hidden_size, tokens = (250880, 1024, 3000) if CUDA else (500, 32, 40)
    where, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    from megatron.core import parallel_state

    whole = Columns(0, columns - 100, parallel_state.get_tensor_model_parallel_group())
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
        weight = (torch.randn(columns, hidden_size, device=where, generator=generator) * 0.1).to(dtype).requires_grad_()
        hidden = torch.randn(tokens, 2, hidden_size, device=where, generator=generator).to(dtype).requires_grad_()
        said = torch.randint(0, whole.real, (2, tokens), device=where, generator=generator)
        mask = torch.rand(2, tokens, device=where, generator=generator) < 0.4
        factors = torch.randn(2, tokens, device=where, generator=generator)
        output = heads.Output(hidden, weight, whole, False)
        for reader in ("logprobs and entropy", "nll"):
            if reader == "nll":
                loss = heads.next_token_nll(output, said, mask)
            else:
                logprobs, entropy = heads.next_token_logprobs_and_entropy(output, said, 0.8, mask)
                loss = (logprobs * factors + 0.5 * entropy).sum()
            found = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
            expected = exact_head(reader, hidden, weight, whole.real, said, mask, factors)
            errors = [relative(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
            say(
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
    where, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    for rows, columns, dtype in (
        (777, 1030, torch.float32),
        (32768 if CUDA else 512, 8192 if CUDA else 64, torch.bfloat16),
    ):
        inputs, grad = (torch.randn(rows, columns, device=where, generator=generator).to(dtype) * 2 for _ in range(2))
        bias = torch.randn(columns, device=where, generator=generator).to(dtype)
        found = gelu_backward(grad, inputs, bias)
        errors = []
        # of fp64 only so much fits
        for part in (slice(0, columns // 2), slice(columns // 2, columns)):
            exact = [inputs[:, part].double().requires_grad_(), bias[part].double().requires_grad_()]
            F.gelu(exact[0] + exact[1], approximate="tanh").backward(grad[:, part].double())
            errors.append(
                [float(relative(mine[..., part], theirs.grad)) for mine, theirs in zip(found, exact, strict=True)]
            )
        worst = [max(error) for error in zip(*errors, strict=True)]
        say(
            max(worst) <= (1e-6 if dtype == torch.float32 else 4e-3),
            check="gelu",
            dtype=str(dtype)[6:],
            of_inputs=worst[0],
            of_bias=worst[1],
        )


def exact_head(reader, hidden, weight, real, tokens, mask, factors):
    """(loss, gradients) in fp64, 64 predictions at a time."""
    whole = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    row, t = mask[:, 1:].nonzero(as_tuple=True)
    total = 0.0
    for part in torch.arange(row.numel(), device=row.device).split(64):
        logits = whole[0][t[part], row[part]] @ whole[1][:real].T / (1.0 if reader == "nll" else 0.8)
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, tokens[row[part], t[part] + 1][:, None]).squeeze(-1)
        loss = (
            -chosen.sum()
            if reader == "nll"
            else (chosen * factors[row[part], t[part] + 1]).sum() - 0.5 * (logp.exp() * logp).sum()
        )
        loss.backward()
        total += loss.detach()
    return [total, whole[0].grad, whole[1].grad]


def optimizer() -> None:
    where, generator = groups.device(), torch.Generator(device=groups.device()).manual_seed(0)
    state = None
    for step in range(1, 4):
        grad = torch.randn(100_003, device=where, generator=generator) * 0.1
        if state is None:
            weight = torch.randn(100_003, device=where, generator=generator).bfloat16()
            state = [
                [
                    weight.clone(),
                    torch.zeros_like(weight, dtype=torch.int16),
                    torch.zeros_like(weight),
                    torch.zeros_like(weight),
                ]
                for _ in range(2)
            ]
        rest = (
            torch.tensor(0.7, device=where),
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
            update(*tensors, grad, *rest)
    values = [adamw.joined(*tensors[:2]) for tensors in state]
    same = (state[0][3] == state[1][3]).float().mean().item()
    error = relative(values[1] - weight.float().mean(), values[0] - weight.float().mean())
    say(
        float(error) <= 1e-6 and same >= 0.999, check="optimizer kernel", weights=float(error), same_second_moments=same
    )
    losses = {}
    for precision in ("fp32", "bf16"):
        made = learner(
            settings(precision="bf16", optimizer_precision=precision, lr=1e-3, schedule="constant"), "packed"
        )
        losses[precision] = [
            made.step(batch("packed", step % 8), Objective(("loss",), sft.compute))["loss"] for step in range(40)
        ]
    off = max(abs(ours - theirs) / theirs for ours, theirs in zip(*losses.values(), strict=True))
    say(
        off <= 0.01 and losses["bf16"][-1] < losses["bf16"][0] - 0.2,
        check="optimizer",
        largest_difference=off,
        fp32=losses["fp32"][::13],
        bf16=losses["bf16"][::13],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=["head", "gelu", "optimizer", "layers"])
    parser.add_argument(
        "--rows", nargs="+", choices=("whole", "packed"), default=["whole", "packed"], help="of the layers' check"
    )
    given = parser.parse_args()
    with groups.ranks(1, 1, 1):
        for name in given.checks:
            try:
                {"head": head, "gelu": gelu, "optimizer": optimizer, "layers": lambda: layers(given.rows)}[name]()
            except Exception as error:  # noqa: BLE001 - the other checks still run
                traceback.print_exc()
                say(False, check=name, error=f"{type(error).__name__}: {error}"[:800])
    sys.exit(int(bool(missed)))
