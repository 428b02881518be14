"""Each attention backend against fp64, forward and backward, plain, padded and packed; and which
one a run takes.

flash-attn and Transformer Engine need a GPU: here their calls are held against stand-ins that
compute what the packages document (bias -slope * |query - key|, cu_seqlens, their layouts).
benchmarks/training/parity_gpu.py runs the real ones where they are installed.
"""

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from tests.support.attention import document_ids, errors, reference
from tests.support.distributed import run
from training import sft
from training.errors import ConfigError
from training.models import attention_backends, norms
from training.models.attention import Documents, alibi_slopes

KINDS = ("plain", "padded", "packed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "groups"), [(8, 0), (12, 0), (14, 0), (6, 2), (8, 8)])
def test_sdpa_agrees_with_fp64(kind, heads, groups):
    """With ALiBi, and without it for grouped queries."""
    for length in (1, 2, 7, 33) if kind == "plain" else (33,):
        output, gradient = errors(
            attention_backends.sdpa, document_ids(kind, 2, length), 2, length, heads, 8, groups=groups
        )
        assert output < 1e-5 and gradient < 2e-5
    output, gradient = errors(
        attention_backends.sdpa, document_ids(kind, 2, 33), 2, 33, heads, 8, torch.bfloat16, groups=groups
    )
    assert output < 1e-2 and gradient < 2e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [0, 2])
def test_flex_attention_s_scores_and_masks_agree_with_fp64(kind, groups):
    """The forward pass, uncompiled: FlexAttention has no backward pass on the CPU."""
    (output,) = errors(
        attention_backends.flex, document_ids(kind, 2, 256), 2, 256, 6, 16, backward=False, groups=groups
    )
    assert output < 1e-5
    # Of 16 bits ALiBi is written in another way.
    (output,) = errors(
        attention_backends.flex,
        document_ids(kind, 2, 256),
        2,
        256,
        6,
        16,
        torch.bfloat16,
        backward=False,
        groups=groups,
    )
    assert output < 1e-2


def test_only_whole_rows_promise_that_no_query_is_left_without_keys():
    """With that promise packed rows were NaN on a GPU; the CPU's FlexAttention does not read it.
    Whichever comes first, a compiled graph of whole rows serves no others, with one document and
    padding neither, and at any length."""
    promised = []

    def note(graph, inputs):
        (options,) = (
            argument
            for node in graph.graph.nodes
            if "flex_attention" in str(node.target)
            for argument in node.args
            if isinstance(argument, dict) and "ROWS_GUARANTEED_SAFE" in argument
        )
        return lambda *arguments: promised.append(options["ROWS_GUARANTEED_SAFE"]) or graph.forward(*arguments)

    attention_backends.expect_many_shapes()
    attend = torch.compile(attention_backends.flex, fullgraph=True, backend=note)

    def kernel(query, key, value, slopes, scale, documents):
        documents = Documents(None, True) if documents is None else documents
        documents.blocks = (
            attention_backends.causal_blocks(len(query), query.device) if documents.ids is None else documents.blocks
        )
        return attend(query, key, value, slopes, scale, documents)

    seen = [
        ("packed", 128),
        ("plain", 128),
        ("packed", 128),
        ("plain", 256),
        ("padded", 256),
        ("packed", 384),
        ("plain", 128),
    ]
    for kind, length in seen:
        (output,) = errors(kernel, document_ids(kind, 2, length), 2, length, 4, 16, backward=False)
        assert output < 1e-5
    assert promised == [kind == "plain" for kind, _ in seen]


def test_a_wrong_slope_or_a_document_too_far_would_be_seen():
    """The tolerances above tell right from nearly right."""

    def doubled(query, key, value, slopes, scale, documents):
        return attention_backends.sdpa(query, key, value, slopes * 1.01, scale, documents)

    def unpacked(query, key, value, slopes, scale, documents):
        return attention_backends.sdpa(query, key, value, slopes, scale, None)

    assert errors(doubled, None, 2, 33, 6, 8)[0] > 1e-4
    assert errors(unpacked, document_ids("packed", 2, 33), 2, 33, 6, 8)[0] > 0.1


def attend(query, key, value, slopes, scale, ends=None):
    """(B, T, H, D), or with ``ends`` (tokens, H, D), in fp64 -> the same shape and type."""
    if ends is None:
        out = reference(*(x.transpose(0, 1) for x in (query, key, value)), slopes, scale, None).transpose(0, 1)
    else:
        ids = Documents.from_lengths(ends, query.size(0)).ids
        out = reference(*(x[:, None] for x in (query, key, value)), slopes, scale, ids)
    return out.reshape(query.shape).to(query.dtype)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None
):
    assert causal and dropout_p == 0.0 and (alibi_slopes is None or alibi_slopes.dtype == torch.float32)
    return attend(q, k, v, alibi_slopes, softmax_scale)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
):
    assert causal and dropout_p == 0.0 and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max()) and int(cu_seqlens_q[-1]) == q.size(0)
    return attend(q, k, v, alibi_slopes, softmax_scale, cu_seqlens_q)


class DotProductAttention:
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        softmax_scale=None,
        attn_mask_type="causal",
        qkv_format="sbhd",
    ):
        assert attention_dropout == 0.0
        self.heads, self.groups, self.channels, self.scale = (
            num_attention_heads,
            num_gqa_groups,
            kv_channels,
            softmax_scale,
        )

    def __call__(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        core_attention_bias_type="no_bias",
        alibi_slopes=None,
    ):
        assert core_attention_bias_type == ("no_bias" if alibi_slopes is None else "alibi")
        assert query_layer.shape[-2:] == (self.heads, self.channels) and key_layer.shape[-2:] == (
            self.groups,
            self.channels,
        )
        assert (qkv_format, attn_mask_type) == (
            ("sbhd", "causal") if cu_seqlens_q is None else ("thd", "padding_causal")
        )
        layers = (query_layer, key_layer, value_layer)
        if cu_seqlens_q is None:
            return attend(*(x.transpose(0, 1) for x in layers), alibi_slopes, self.scale).transpose(0, 1).flatten(2)
        return attend(*layers, alibi_slopes, self.scale, cu_seqlens_q).flatten(1)


@pytest.fixture
def stand_ins(monkeypatch):
    flash, te, te_pytorch = (
        types.ModuleType(name) for name in ("flash_attn", "transformer_engine", "transformer_engine.pytorch")
    )
    flash.flash_attn_func, flash.flash_attn_varlen_func, te_pytorch.DotProductAttention = (
        flash_attn_func,
        flash_attn_varlen_func,
        DotProductAttention,
    )
    for module in (flash, te, te_pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    attention_backends.available.cache_clear()
    attention_backends._te_attention.cache_clear()
    yield
    attention_backends.available.cache_clear()
    attention_backends._te_attention.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("name", ["flash", "te"])
def test_the_installed_packages_are_called_as_they_document(stand_ins, name, groups, kind):
    output, gradient = errors(attention_backends.KERNELS[name], document_ids(kind, 2, 33), 2, 33, 6, 8, groups=groups)
    assert output < 1e-6 and gradient < 1e-6


def test_the_measured_backend_is_chosen_whatever_else_is_installed(stand_ins, monkeypatch):
    bf16, fp32 = torch.bfloat16, torch.float32
    assert attention_backends.choose("auto", "cpu", bf16, 64) == "sdpa"
    assert (
        attention_backends.choose("auto", "cuda", bf16, 64) == "flex"
        and attention_backends.choose("auto", "cuda", bf16, 8) == "sdpa"
    )
    assert attention_backends.choose("flash", "cuda", bf16, 64) == "flash"
    assert attention_backends.choose("auto", "cuda", fp32, 64) == "flex"
    assert attention_backends.choose("te", "cuda", bf16, 64) == "te"
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    attention_backends.available.cache_clear()
    assert attention_backends.choose("auto", "cuda", bf16, 64) == "flex"
    assert attention_backends.choose("auto", "cuda", bf16, 8) == "sdpa"
    refused = (
        ("flash", "cuda", bf16, 64, "is not installed here .pip install flash-attn"),
        ("flex", "cpu", bf16, 64, "needs a GPU"),
        ("flex", "cuda", bf16, 8, "needs heads of 16 dimensions or more"),
    )
    for wanted, device, dtype, dim, problem in refused:
        with pytest.raises(ConfigError, match=f'attention = "{wanted}" {problem}.*set attention = "auto"'):
            attention_backends.choose(wanted, device, dtype, dim)


def test_documents_from_cu_seqlens_and_back():
    documents = Documents.from_lengths(torch.tensor([0, 3, 4, 9]), 12)
    assert documents.ids.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3]]
    assert documents.cumulative.tolist() == [0, 3, 4, 9, 12] and documents.longest == 5
    # a document never goes on in the next row, even with the same id
    both = Documents(torch.tensor([[0, 0, 1], [1, 1, 1]]))
    assert both.cumulative.tolist() == [0, 2, 3, 6]


def test_one_mask_of_packed_rows_serves_all_layers_and_one_bias_stays():
    """Each layer keeps what it attended with until its backward pass."""
    documents, slopes = Documents(torch.tensor([[0, 0, 1, 1]])), alibi_slopes(2)
    query = torch.randn(4, 1, 2, 8)
    masks = set()
    for _ in range(3):
        attention_backends.sdpa(query, query, query, slopes, 1.0, documents)
        masks.add(id(documents._separated[1]))
    bias = attention_backends.causal_alibi(attention_backends._numbers(slopes), 4, 4, query.device, query.dtype)
    assert masks == {id(documents.separated(bias))}
    assert (
        documents.separated(bias) is documents.separated(bias)
        and attention_backends.causal_alibi.cache_info().maxsize == 1
    )
    assert documents.separated(bias)[0, :, 2, 1].isinf().all() and torch.equal(
        documents.separated(bias)[0, :, 3, 2], bias[0, :, 3, 2]
    )


def test_slopes_stay_fp32_and_are_those_of_the_rank():
    from training.models.attention import rank_slopes

    whole = alibi_slopes(14)
    parts = [rank_slopes(14, first, 7, torch.device("cpu")) for first in (0, 7)]
    assert torch.equal(torch.cat(parts), whole) and whole.dtype == torch.float32


@pytest.fixture
def a_gpu(monkeypatch):
    """Only for the question whether what is asked for is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    norms.check.cache_clear()
    yield monkeypatch
    norms.check.cache_clear()


def install(monkeypatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    norms.check.cache_clear()


def test_fused_kernels_that_are_asked_for_are_the_ones_meant_and_whole(a_gpu):
    """NVIDIA's Apex is told from PyPI's, and from one without extensions."""
    for fused, problem in (
        ("te", "needs Transformer Engine, which is not installed"),
        ("apex", "needs NVIDIA's Apex, which is not"),
    ):
        with pytest.raises(ConfigError, match=f'fused = "{fused}" {problem}.*or set fused = "torch"'):
            norms.check(fused)
    install(a_gpu, "apex")  # PyPI's: no apex.optimizers
    with pytest.raises(ConfigError, match="PyPI's apex is another project"):
        norms.check("apex")
    install(a_gpu, "apex.optimizers")
    with pytest.raises(ConfigError, match="with its CUDA extensions, which this one lacks.*--cpp_ext --cuda_ext"):
        norms.check("apex")
    install(
        a_gpu,
        "amp_C",
        "fused_layer_norm_cuda",
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.pytorch.optimizers",
    )
    norms.check("apex")
    norms.check("te")


def test_what_is_installed_changes_no_norm(a_gpu):
    install(
        a_gpu,
        "apex",
        "apex.optimizers",
        "amp_C",
        "fused_layer_norm_cuda",
        "transformer_engine",
        "transformer_engine.pytorch",
        "transformer_engine.pytorch.optimizers",
    )
    assert norms.norm_class("LayerNorm") is norms.LayerNorm and norms.norm_class("RMSNorm") is norms.RMSNorm
    assert norms.describe("flex") == "attention: FlexAttention, norms and AdamW: torch"


def test_fused_kernels_need_a_gpu():
    norms.check.cache_clear()
    with pytest.raises(ConfigError, match='fused = "te" needs a GPU; or set fused = "torch"'):
        norms.check("te")


APEX = {
    "__init__.py": "",
    "optimizers.py": """
class FusedAdam:
    def __init__(self, *given, **more):
        raise RuntimeError("megatron-core took Apex's Adam")

FusedSGD = FusedAdam
""",
}


def test_adamw_is_torch_s_where_apex_is_installed(small_run, tmp_path):
    """In a process of its own, where megatron-core finds an Apex when it is imported: two steps,
    saved, and two more after a resume give what they give without."""
    (tmp_path / "site" / "apex").mkdir(parents=True)
    for name, text in APEX.items():
        (tmp_path / "site" / "apex" / name).write_text(text)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]),
    }
    # the third update is seen in the fourth loss: it counts Adam's steps from the checkpoint's
    for iterations in (
        2,
        4,
    ):
        with_apex, without = (
            small_run.sft(tmp_path / kind, iterations=iterations, sample_every=0, schedule="constant")
            for kind in ("with", "without")
        )
        file = tmp_path / "config.json"
        file.write_text(json.dumps(dataclasses.asdict(with_apex)))
        process = subprocess.run(
            [sys.executable, "-m", "training.sft", str(file)], env=environment, text=True, capture_output=True
        )
        assert process.returncode == 0, process.stderr[-3000:]
        run(sft.run, 1, 1, 1, without)
    rows = [
        [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in ("with", "without")
    ]
    assert [[(row["loss"], row["grad_norm"]) for row in kind] for kind in rows] == [
        [(row["loss"], row["grad_norm"]) for row in rows[1]]
    ] * 2
    assert len(rows[0]) == 4
