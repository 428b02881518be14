"""BLOOM on megatron-core beside the parity matrix (test_model_parity.py): slopes, heads, bf16, the
model's shape."""

import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from transformers import BloomModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.support.bloom import tiny_bloom
from tests.support.distributed import run
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.errors import ConfigError
from training.models import chunked_logprobs, gelu
from training.models.attention import alibi_slopes
from training.models.bloom import module as bloom_modules
from training.models.heads import Output, next_token_logprobs, next_token_logprobs_and_entropy, next_token_nll
from training.models.linear import accumulate
from training.trainer.step import Batch, Learner, Objective, build_model, evaluate, split

VOCAB = 300  # padded to 384 or 512: padding must not weigh in any softmax


@pytest.fixture(scope="module", params=[6], ids=["6 heads"])
def bloom(request, tmp_path_factory):
    """(run folder with hf/ and convert/, the Hugging Face model)."""
    folder = tmp_path_factory.mktemp("bloom")
    model = tiny_bloom(folder / "hf", heads=request.param, hidden=48, vocab=VOCAB)
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf"))))
    return folder, model


def config(tensor, pipeline, **values) -> SFTConfig:
    defaults = dict(
        precision="fp32",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        micro_batch_size=2,
        global_batch_size=8,
        iterations=8,
        warmup_iterations=0,
        lr=3e-3,
        weight_decay=0.1,
        clip_grad=0.5,
        schedule="constant",
        adam_beta2=0.95,
    )
    return SFTConfig(paths=Paths("", "", "", "", ""), **{**defaults, **values})


def load(folder, settings: SFTConfig):
    model = build_model(Shape.read(folder / "hf"), settings, "lm")
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
    return model


def batch(seed: int = 0, rows: int = 8, length: int = 16) -> Batch:
    """Random tokens with ragged response masks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
    starts = torch.randint(1, length // 2, (rows, 1), generator=generator)
    ends = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    position = torch.arange(length)
    return {"tokens": tokens, "response_mask": (position >= starts) & (position < ends)}


def nll(output, micro):
    loss = -(next_token_logprobs(output, micro["tokens"]) * micro["response_mask"]).sum()
    return loss, micro["response_mask"].sum(), loss[None]


def test_slopes_equal_hugging_face():
    for heads in (1, 6, 8, 12, 14, 16, 112):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        # ours are computed in double precision
        assert torch.allclose(alibi_slopes(heads), theirs, rtol=1e-6, atol=0)


def trajectory(folder, settings, steps):
    learner = Learner(load(folder, settings), settings, settings.lr, steps, 0)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    history = []
    for step in range(steps):
        mine = split(batch(step), 8 // ranks)[rank]
        metrics = learner.step(split(mine, 2), Objective(("loss",), nll))
        history.append((metrics["loss"], metrics["grad_norm"]))
    return history


def test_bf16_with_fp32_master_weights_follows_fp32(bloom):
    folder, _ = bloom
    exact = run(trajectory, 1, 1, 1, folder, config(1, 1), 6)[0]
    for history in run(trajectory, 1, 2, 1, folder, config(1, 2, precision="bf16"), 6):
        for (loss, _), (expected, _) in zip(history, exact, strict=True):
            assert loss == pytest.approx(expected, rel=0.02)


def passes(folder, settings) -> tuple[int, int]:
    """How often one step of one micro-batch runs the first layer's feed-forward part, and the
    model's GELUs, forwards."""
    calls = {"layer": 0, "gelu": 0}
    learner = Learner(load(folder, settings), settings, 1e-3, 1, 0)
    layers = learner.model.decoder.layers

    def counted(*given):
        calls["gelu"] += 1
        return gelu.gelu(*given)

    def count(*_):
        calls["layer"] += 1

    layers[0].mlp.register_forward_hook(count)
    with mock.patch.object(bloom_modules, "gelu", counted):
        learner.step([batch(rows=2)], Objective(("loss",), nll))
    return calls["layer"], calls["gelu"] // len(layers)


@pytest.mark.parametrize(("recompute", "expected"), [("none", (1, 1)), ("selective", (1, 2)), ("full", (2, 2))])
def test_what_is_recomputed_is_computed_twice(bloom, recompute, expected):
    """Equal gradients (test_model_parity) would also come of a switch that does nothing."""
    folder, _ = bloom
    assert run(passes, 1, 1, 1, folder, config(1, 1, recompute=recompute))[0] == expected


def test_this_initialisation_tells_the_gelu_formulas_apart(bloom):
    """The parity tests would see megatron-core's other GELU: at Hugging Face's default
    initialisation they would not."""
    _, model = bloom
    tokens = batch()["tokens"]
    with torch.no_grad():
        tanh = model(input_ids=tokens).logits
        wrong = type(model)(model.config)
        wrong.load_state_dict(model.state_dict())
        for block in wrong.transformer.h:
            block.mlp.gelu_impl = torch.nn.GELU()
        assert (wrong.eval()(input_ids=tokens).logits - tanh).abs().max() > 20 * 1e-5 * tanh.abs().max()


REAL = 20
"""Columns of the vocabulary in the tests of the head; padded to 32, so that of four ranks the last
has padding only."""


def read_head(hidden, weight, tokens, mask, sequence, chunk):
    """Each reader's values, and the gradients that it leaves: of the hidden states whole, of this
    rank's rows of the weight."""
    group = parallel_state.get_tensor_model_parallel_group()
    rank, size, results = group.rank(), weight.size(0) // group.size(), []
    columns = chunked_logprobs.Columns(rank * size, min(max(REAL - rank * size, 0), size), group)
    factors = torch.linspace(-1, 2, tokens.numel()).view(tokens.shape)
    chunked_logprobs.CHUNK_LOGITS = chunk
    for reader in ("logprobs", "entropy", "nll"):
        mine = hidden.chunk(group.size())[rank] if sequence else hidden
        mine, part = mine.clone().requires_grad_(), weight.chunk(group.size())[rank].clone().requires_grad_()
        output = Output(mine, part, columns, sequence)
        if reader == "nll":
            values = next_token_nll(output, tokens, mask)
            (3 * values).backward()
        elif reader == "logprobs":
            values = next_token_logprobs(output, tokens, 0.7, mask)
            (values * factors).sum().backward()
        else:
            logprobs, values = next_token_logprobs_and_entropy(output, tokens, 0.7, mask)
            (values * factors + logprobs).sum().backward()
        gradient = tensor_parallel.gather_from_sequence_parallel_region(mine.grad) if sequence else mine.grad
        results.append((values.detach(), gradient, part.grad))
    return results


@pytest.mark.parametrize(
    "tensor, sequence, chunk", [(1, False, 2**29), (1, False, 5 * 32), (2, True, 20), (4, False, 2**29)]
)
@pytest.mark.parametrize("masked", ["all", "some", "none"])
def test_the_head_read_in_chunks_equals_a_softmax_over_all_logits(tensor, sequence, chunk, masked):
    """Values and gradients, in double precision on the other side: chunks of all tokens, five and
    one; columns over 1, 2 and 4 ranks."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 3, 6, generator=generator), torch.randn(32, 6, generator=generator)
    tokens = torch.randint(0, REAL, (3, 8), generator=generator)
    mask = {
        "all": None,
        "some": torch.rand(3, 8, generator=generator) < 0.5,
        "none": torch.zeros(3, 8, dtype=torch.bool),
    }[masked]
    results = run(read_head, tensor, 1, 1, hidden, weight, tokens, mask, sequence, chunk)
    counted = torch.ones(3, 8, dtype=torch.bool) if mask is None else mask.clone()
    counted[:, 0] = False
    factors = torch.linspace(-1, 2, 24).view(3, 8)
    for number, temperature in enumerate((0.7, 0.7, 1.0)):
        whole, matrix = hidden.double().requires_grad_(), weight.double().requires_grad_()
        made = torch.distributions.Categorical(logits=(whole @ matrix[:REAL].T).transpose(0, 1)[:, :-1] / temperature)
        logprobs, entropy = (
            F.pad(values, (1, 0)) * counted for values in (made.log_prob(tokens[:, 1:]), made.entropy())
        )
        values, loss = [
            (logprobs, (logprobs * factors).sum()),
            (entropy, (entropy * factors + logprobs).sum()),
            (-logprobs.sum(), -3 * logprobs.sum()),
        ][number]
        loss.backward()
        for rank in results:
            assert torch.allclose(rank[number][0], values.float(), atol=1e-5)
            assert torch.allclose(rank[number][1], whole.grad.float(), atol=1e-5)
        assert torch.allclose(torch.cat([rank[number][2] for rank in results]), matrix.grad.float(), atol=1e-5)


def bf16_head(rows: int):
    """Log-probabilities and entropies of ``rows`` tokens with a bf16 head, and the gradients, in
    two chunks; inputs beside them."""
    generator = torch.Generator().manual_seed(3)
    hidden = (torch.randn(rows + 1, 1, 16, generator=generator) * 3).bfloat16().requires_grad_()
    weight = (torch.randn(64, 16, generator=generator) * 2).bfloat16().requires_grad_()
    tokens = torch.randint(0, 50, (1, rows + 1), generator=generator)
    chunked_logprobs.CHUNK_LOGITS = 64 * (rows // 2 + 1)
    output = Output(
        hidden, weight, chunked_logprobs.Columns(0, 50, parallel_state.get_tensor_model_parallel_group()), False
    )
    logprobs, entropy = next_token_logprobs_and_entropy(output, tokens)
    nll = next_token_nll(output, tokens)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in ((logprobs + entropy).sum(), nll)]
    return hidden.detach(), weight.detach(), tokens, (logprobs.detach(), entropy.detach(), nll.detach()), gradients


@pytest.mark.parametrize("rows", [5, 90])
def test_the_logits_of_a_bf16_head_are_fp32(rows):
    """Logits here are up to 60: in bf16 they would be off by up to 1/4. Chunks of up to 16 rows and
    of more: a narrower gradient is written over the logits."""
    hidden, weight, tokens, (logprobs, entropy, nll), gradients = run(bf16_head, 1, 1, 1, rows)[0]
    whole, matrix = hidden.double().requires_grad_(), weight.double().requires_grad_()
    made = torch.distributions.Categorical(logits=(whole @ matrix[:50].T).transpose(0, 1)[:, :-1])
    exact, exact_entropy = made.log_prob(tokens[:, 1:]), made.entropy()
    assert torch.allclose(logprobs[:, 1:], exact.float(), atol=1e-4) and torch.allclose(
        entropy[:, 1:], exact_entropy.float(), atol=1e-4
    )
    assert torch.allclose(nll, -exact.sum().float(), rtol=1e-5)
    for found, loss in zip(gradients, ((exact + exact_entropy).sum(), -exact.sum()), strict=True):
        for mine, theirs in zip(found, torch.autograd.grad(loss, (whole, matrix), retain_graph=True), strict=True):
            assert mine.dtype == torch.bfloat16 and (mine.double() - theirs).norm() <= 1e-2 * theirs.norm()


def head_gradient_in_its_buffer(upstream: float):
    hidden, weight = torch.randn(5, 1, 8, requires_grad=True), torch.nn.Parameter(torch.randn(32, 8))
    weight.main_grad = torch.full((32, 8), 2.0)
    accumulate(torch.nn.ParameterList([weight]))
    output = Output(
        hidden, weight, chunked_logprobs.Columns(0, 32, parallel_state.get_tensor_model_parallel_group()), False
    )
    (upstream * next_token_nll(output, torch.arange(5)[None])).backward()
    without = torch.nn.Parameter(weight.detach().clone())
    next_token_nll(Output(hidden, without, output.columns, False), torch.arange(5)[None]).backward()
    return weight.grad, weight.main_grad - 2, without.grad


def test_the_head_s_gradient_is_added_to_its_buffer_in_the_forward_pass():
    returned, added, expected = run(head_gradient_in_its_buffer, 1, 1, 1, 1.0)[0]
    assert returned is None and torch.allclose(added, expected, atol=1e-5)
    with pytest.raises(Exception, match="upstream gradient 3, but"):
        run(head_gradient_in_its_buffer, 1, 1, 1, 3.0)


def test_scalar_head_reads_hidden_states_as_hugging_face_gives_them(bloom):
    folder, model = bloom
    tokens = batch(rows=4)["tokens"]
    backbone = BloomModel.from_pretrained(folder / "hf").float().eval()

    def score(settings):
        scalar = build_model(Shape.read(folder / "hf"), settings, "scalar")
        format.load_weights(StageFolder(folder / "convert").resolve() / "model", scalar, fresh_head=5)
        linear = (
            (scalar.score.linear.weight.detach().clone(), scalar.score.linear.bias.detach().clone())
            if scalar.post_process
            else None
        )
        return evaluate(scalar, {"tokens": tokens}, 2, lambda values, micro: values), linear

    for layout in ((1, 1), (2, 1), (1, 2)):
        results = run(score, *layout, 1, config(*layout, sequence_parallel=layout[0] > 1))
        weight, bias = next(linear for _, linear in results if linear)
        with torch.no_grad():
            expected = backbone(tokens).last_hidden_state @ weight.T + bias
        assert weight.std().item() == pytest.approx(49**-0.5, rel=0.4) and not bias.any()
        for values, _ in results:
            assert torch.allclose(values, expected.squeeze(-1), atol=1e-5)


def test_shape_errors_name_the_file_and_the_fix(tmp_path):
    with pytest.raises(ConfigError, match="config.json is missing"):
        Shape.read(tmp_path)
    good = {
        "model_type": "bloom",
        "n_layer": 30,
        "n_embed": 4096,
        "num_attention_heads": 32,
        "vocab_size": 250880,
        "layer_norm_epsilon": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(good))
    shape = Shape.read(tmp_path)  # the field names of the published bloom-7b1
    assert (shape.layers, shape.hidden, shape.heads, shape.vocab) == (30, 4096, 32, 250880)
    assert [shape.padded_vocab(tp) for tp in (1, 8)] == [250880, 250880]
    shape.check_layout(8, 4)
    with pytest.raises(
        ConfigError, match="pipeline_parallel = 31 is more than the model's 30 layers; choose any from 1 to 30"
    ):
        shape.check_layout(1, 31)
    for change in (
        {"model_type": "llama"},
        {"model_type": "gpt2"},
        {"tie_word_embeddings": "no"},
        {"apply_residual_connection_post_layernorm": True},
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=next(iter(change))):
            Shape.read(tmp_path)
