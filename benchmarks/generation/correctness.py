"""Do the rollout engine's kernels and greedy decoding compute what plain code does?"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

from benchmarks.common import print_row
from benchmarks.device import DEVICE
from tests.support import generation_models
from tests.support.attention import relative
from tests.support.bloom import tiny_bloom
from tests.support.llama import tiny_llama, tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3
from training.generation import sampling, torch_ops
from training.generation.request import Sampling
from training.generation.rollout_workers import operations
from training.models.attention import alibi_slopes
from training.models.kv_cache import Batch

TINY = {
    "llama": tiny_llama,
    "llama 3": tiny_llama3,
    "mistral": functools.partial(tiny_mistral, head_dim=64),
    "qwen2": tiny_qwen2,
    "qwen3": functools.partial(tiny_qwen3, head_dim=64),
}
"""Small models of Llama's kind."""
OPS = operations(DEVICE)


def paged(
    kv_heads: int, group: int, dim: int, page: int, lengths: list[int], counts: list[int] | None, dtype: torch.dtype
):
    """A cache full of random keys and values in shuffled pages, the queries of a batch, and a
    function that makes the batch."""
    pages = [-(-length // page) for length in lengths]
    cache = torch.randn(2, sum(pages) + 1, kv_heads, page, dim, device=DEVICE).to(dtype)
    numbers, table = (
        iter((torch.randperm(sum(pages)) + 1).tolist()),
        torch.zeros(len(lengths), max(pages), dtype=torch.int32),
    )
    for row, count in zip(table, pages, strict=True):
        row[:count] = torch.tensor([next(numbers) for _ in range(count)])
    new = counts or [1] * len(lengths)
    qkv = torch.randn(sum(new), kv_heads, group + 2, dim, device=DEVICE).to(dtype)
    position = torch.cat([torch.arange(length - count, length) for length, count in zip(lengths, new, strict=True)])
    owner = torch.cat([torch.full((count,), row) for row, count in enumerate(new)])
    starts = torch.tensor([0, *new]).cumsum(0)

    def batch() -> Batch:
        places = [tensor.to(DEVICE) for tensor in (table, torch.tensor(lengths), position)]
        prefill = (starts.to(DEVICE), counts, owner.to(DEVICE)) if counts else ()
        return Batch(*places, page, max(lengths), *prefill)

    return cache, qkv, batch


def kernels(small: bool) -> None:
    """The kernels against plain torch in fp64. Tolerances, relative L2: fp32 1e-5, bf16 1e-2."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        attention(small, dtype, tolerance)
        residual_norm(dtype, tolerance)
    rows, vocab = (8, 300) if small else (64, 250880)
    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    temperature, uniforms = torch.linspace(0, 1.5, rows, device=DEVICE), torch.rand(rows, device=DEVICE)
    sample(logits, temperature, uniforms)
    sample_from_shards(logits, temperature, uniforms)


def attention(small: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Decode and prefill, for heads of the published models."""
    heads = [(3, 1, 16)] if small else [(14, 1, 64), (8, 1, 80), (16, 1, 96), (32, 1, 128), (4, 8, 128)]
    lengths, counts = [1, 31, 64, 65, 300, 513], [1, 31, 33, 2, 300, 130]
    for kv_heads, group, dim in heads:
        for kind in ("decode", "prefill"):
            new_tokens = counts if kind == "prefill" else None
            cache, qkv, batch = paged(kv_heads, group, dim, 32, lengths, new_tokens, dtype)
            query, key, value = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
            OPS.write(cache, key, value, batch())
            written = cache.clone()
            torch_ops.write(written, key, value, batch())
            slopes, scale = alibi_slopes(kv_heads * group).to(DEVICE), dim**-0.5
            exact = torch_ops.attend(written.double(), query.double(), batch(), slopes, scale)
            error = relative(OPS.attend(cache, query, batch(), slopes, scale), exact)
            print_row(
                error <= tolerance and torch.equal(cache, written),
                step="kernels",
                kernel=kind,
                dtype=str(dtype)[6:],
                heads=kv_heads * group,
                kv_heads=kv_heads,
                head_dim=dim,
                error=error,
            )


def residual_norm(dtype: torch.dtype, tolerance: float) -> None:
    hidden, delta = torch.randn(2, 7, 4096, device=DEVICE).to(dtype)
    bias, weight, shift = torch.randn(3, 4096, device=DEVICE).to(dtype)
    exact = torch_ops.residual_norm(
        hidden.double(), delta.double(), bias.double(), weight.double(), shift.double(), 1e-5
    )
    error = relative(OPS.residual_norm(hidden, delta, bias, weight, shift, 1e-5), exact)
    print_row(error <= tolerance, step="kernels", kernel="residual and norm", dtype=str(dtype)[6:], error=error)


def sample(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> None:
    """Sampled tokens and their log-probabilities; ``logits`` (rows, V)."""
    rows, logits64 = logits.size(0), logits.double()
    for name, truncation in (("all", ()), ("top-k", (50, 1.0)), ("top-p", (0, 0.9)), ("both", (1000, 0.5))):
        limits = [torch.full((rows,), value, device=DEVICE) for value in truncation]
        tokens, logprobs = OPS.choose(logits, temperature, uniforms, *limits)
        exact, _ = sampling.choose(logits64, temperature.double(), uniforms.double(), *limits)
        heated = logits64 / torch.where(temperature == 0, 1, temperature)[:, None]
        expected = heated.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        worst = (logprobs - expected).abs().max().item()
        # a draw within rounding of the border between two tokens may fall to either
        differ = int((tokens != exact).sum())
        print_row(
            worst < 1e-4 and differ <= max(1, rows // 16),
            step="kernels",
            kernel="sampling",
            of=name,
            different=differ,
            of_rows=rows,
            logprobs=worst,
        )


def sample_from_shards(logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor) -> None:
    """The same where each rank has a part of the columns of ``logits`` (rows, V)."""
    rows = logits.size(0)
    one_gpu, _ = OPS.choose(logits, temperature, uniforms)
    for ranks in (2, 4, 8):
        tokens, logprobs = generation_models.pick_from_shards(OPS, logits, ranks, temperature, uniforms)
        wrong, worst = generation_models.off(tokens, logprobs, logits, temperature, uniforms)
        # as above; a rank's chunks start at other columns than one GPU's, so sums round differently
        differ = int((tokens != one_gpu).sum())
        print_row(
            wrong == 0 and worst < 1e-4 and differ <= max(1, rows // 16),
            step="kernels",
            kernel="sampling",
            of=f"{ranks} ranks' columns",
            different=differ,
            of_rows=rows,
            logprobs=worst,
            wrong=wrong,
        )


def greedy(small: bool) -> None:
    """A random model of each family with a head of its own (a tied one repeats itself), fp32,
    ragged prompts; queries grouped except for BLOOM's, heads of 64 where hidden / heads is 32."""
    count, new = (8, 6) if small else (200, 12)
    for family, make in {"bloom": tiny_bloom, **TINY}.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make(Path(folder), heads=8, hidden=256, vocab=1000, tied=False).to(DEVICE)
            decoder = generation_models.decoder(Path(folder), model, OPS, device=DEVICE)
            prompts = generation_models.prompts(count, 1000, 60)
            expected = [generation_models.greedy(model, prompt, new, None) for prompt in prompts]
            greedy_sampling = Sampling(new, temperature=0)
            replies, _ = generation_models.generate(decoder, prompts, greedy_sampling, async_output=None, context=128)
            same = sum(reply.tokens == row for reply, row in zip(replies, expected, strict=True))
            print_row(same == count, step="greedy", family=family, prompts=count, new_tokens=new, same=same)
