"""The engine's Triton kernels against its plain torch."""

import pytest
import torch

from tests.kernels.where import DEVICE
from tests.support.generation_models import off, pick_from_shards
from training.generation import sampling, torch_ops, triton_ops, triton_sampling
from training.models.attention import alibi_slopes
from training.models.kv_cache import Batch


def close(found: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert (found.double() - exact).norm() <= tolerance * exact.norm()


def paged(kv_heads: int, group: int, dim: int, page: int, lengths: list[int], counts: list[int] | None):
    """A layer's cache with shuffled pages, the new tokens' (query, key, value), and a function that
    makes their batch."""
    pages = [-(-length // page) for length in lengths]
    cache = torch.randn(2, sum(pages) + 1, kv_heads, page, dim, device=DEVICE)
    numbers, table = (
        iter((torch.randperm(sum(pages)) + 1).tolist()),
        torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32),
    )
    for row, count in zip(table, pages, strict=True):
        row[:count] = torch.tensor([next(numbers) for _ in range(count)])
    new = counts or [1] * len(lengths)
    qkv = torch.randn(sum(new), kv_heads, group + 2, dim, device=DEVICE)
    position = torch.cat([torch.arange(length - count, length) for length, count in zip(lengths, new, strict=True)])
    owner = torch.cat([torch.full((count,), row) for row, count in enumerate(new)])

    def batch() -> Batch:
        given = [tensor.to(DEVICE) for tensor in (table, torch.tensor(lengths), position)]
        more = (torch.tensor([0, *new]).cumsum(0).to(DEVICE), counts, owner.to(DEVICE)) if counts else ()
        return Batch(*given, page, max(lengths), *more)

    return cache, (qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]), batch


@pytest.mark.parametrize("programs", [1, 1024], ids=["one part", "split contexts"])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim", "page", "lengths", "counts", "alibi"),
    [
        (3, 1, 16, 4, [1, 5, 70, 130], None, True),
        (2, 1, 20, 8, [33, 64], None, False),
        (2, 3, 16, 4, [1, 5, 70], None, True),
        (3, 1, 16, 4, [9, 70, 130, 1], [9, 66, 3, 1], True),
        (2, 2, 20, 16, [9, 70], [9, 10], False),
    ],
)
def test_attention_over_pages(monkeypatch, programs, kv_heads, group, dim, page, lengths, counts, alibi):
    torch.manual_seed(0)
    monkeypatch.setattr(triton_ops, "PROGRAMS", programs)
    cache, (query, key, value), batch = paged(kv_heads, group, dim, page, lengths, counts)
    written = cache.clone()
    triton_ops.write(cache, key, value, batch())
    torch_ops.write(written, key, value, batch())
    assert torch.equal(cache, written)
    slopes = alibi_slopes(kv_heads * group).to(DEVICE) if alibi else None
    exact = torch_ops.attend(written.double(), query.double(), batch(), slopes, dim**-0.5)
    close(triton_ops.attend(cache, query, batch(), slopes, dim**-0.5), exact)


@pytest.mark.parametrize("given", [(False, False, True), (True, False, True), (True, True, True), (True, False, False)])
def test_residual_and_norm(given):
    """With and without something to add, a bias of it, and the norm's own (RMSNorm has none)."""
    torch.manual_seed(0)
    hidden, delta = torch.randn(2, 5, 48, device=DEVICE)
    bias, weight, shift = torch.randn(3, 48, device=DEVICE)
    delta, bias, shift = (tensor if there else None for tensor, there in zip((delta, bias, shift), given, strict=True))
    exact, summed = hidden.double(), hidden.clone()
    wide = [None if x is None else x.double() for x in (delta, bias, weight, shift)]
    normed = torch_ops.residual_norm(exact, *wide, 1e-5)
    close(triton_ops.residual_norm(summed, delta, bias, weight, shift, 1e-5), normed)
    close(summed, exact)


@pytest.mark.parametrize("kind", ["all", "top-k", "top-p", "both", "holes"])
def test_sampling(monkeypatch, kind):
    """The torch version's tokens, draws at both ends and greedy rows among them; columns beyond the
    vocabulary hold garbage."""
    torch.manual_seed(0)
    monkeypatch.setattr(triton_sampling, "CHUNK", 64)
    rows = 8
    logits = (torch.randn(rows, 220, device=DEVICE) * 3)[:, :200]
    if kind == "holes":
        logits[:, 64:150] = float("-inf")
    heat, uniforms = torch.linspace(0, 1.5, rows, device=DEVICE), torch.rand(rows, device=DEVICE)
    uniforms[1], uniforms[2] = 0, 1 - 2**-24
    top_k = torch.randint(1, 40, (rows,), device=DEVICE) * (kind in ("top-k", "both"))
    top_p = torch.rand(rows, device=DEVICE) if kind in ("top-p", "both") else torch.ones(rows, device=DEVICE)
    truncation = () if kind in ("all", "holes") else (top_k, top_p)
    tokens, logprobs = triton_ops.choose(logits, heat, uniforms, *truncation)
    expected, exact = sampling.choose(logits, heat, uniforms, *truncation)
    assert torch.equal(tokens, expected) and torch.allclose(logprobs, exact, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sampling_from_shards(monkeypatch, ranks):
    """Shards end within a chunk, and of four ranks the last has only padding."""
    torch.manual_seed(0)
    monkeypatch.setattr(triton_sampling, "CHUNK", 64)
    rows, vocab = 24, 350
    logits = torch.randn(rows, vocab, device=DEVICE) * 3
    logits[8:12, 60:300], logits[12:16, :130], logits[16:20, 120:] = float("-inf"), float("-inf"), float("-inf")
    logits[20:, 200], logits[20:, 100] = 20, 20
    heat, uniforms = torch.linspace(0, 1.5, 4, device=DEVICE).repeat(6), torch.rand(rows, device=DEVICE)
    uniforms[1::4], uniforms[2::4] = 0, 1 - 2**-24
    for ops in (triton_ops, torch_ops):
        wrong, error = off(*pick_from_shards(ops, logits, ranks, heat, uniforms), logits, heat, uniforms)
        assert wrong == 0 and error < 1e-5
