"""Generation by a model in training on every layout: weights moved, requests divided, tokens those
of Hugging Face one prompt at a time."""

import importlib.util
from pathlib import Path

import pytest
import torch

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.support import generation_models
from tests.support.bloom import tiny_bloom
from tests.support.distributed import run
from tests.support.layouts import enter, settings
from tests.support.llama import tiny_llama3, tiny_qwen2, tiny_qwen3
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.generation.engine import EngineLimits
from training.generation.request import Request, Sampling, draws
from training.generation.rollout_workers import Replicas
from training.generation.weight_sync import LocalTensor, named_weights, plan, rounds
from training.trainer.step import build_model

VOCAB, STEPS = 300, 12
PROMPTS = [[5, 17, 200], [44, 8, 9, 150, 299, 12, 60], [7], [10, 11, 12, 13, 14], [5, 17, 200]]


@pytest.fixture(
    scope="module",
    params=[
        (tiny_bloom, {"tied": True}),
        (tiny_llama3, {"tied": False, "groups": 4}),
        (tiny_qwen2, {"groups": 4}),
        (tiny_qwen3, {"groups": 4, "head_dim": 16}),
    ],
    ids=["bloom", "llama", "qwen2", "qwen3"],
)
def small(request, tmp_path_factory):
    """Five layers, eight heads: (folder with hf/ and convert/, responses of Hugging Face to
    PROMPTS, an EOS that ends one early)."""
    folder, (make, options) = tmp_path_factory.mktemp("small"), request.param
    model = make(folder / "hf", heads=8, hidden=48, layers=5, vocab=VOCAB, **options)
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf"))))
    free = [generation_models.greedy(model, prompt, STEPS, None) for prompt in PROMPTS]
    eos = free[1][4]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert min(map(len, expected)) < STEPS == max(map(len, expected))
    return folder, expected, eos


def ours(folder, cases, eos):
    """Of each case ((TP, PP, parts a stage), generation ranks): greedy and sampled responses to
    PROMPTS, the report, views of weights.

    Among the sampled: one that truncates, for fewer steps than the others go on without it. Last,
    where nothing moves, a penalised one.
    """
    found = []
    for layout, size in cases:
        enter(*layout)
        shape = Shape.read(folder / "hf")
        model = build_model(shape, settings(*layout), "lm")
        format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
        replicas = Replicas(model, shape, EngineLimits(64, page=4), eos, size)
        greedy = replicas.generate([Request(prompt, Sampling(STEPS, temperature=0)) for prompt in PROMPTS])
        uniforms = draws(1, 3, len(PROMPTS), STEPS)
        asked = [Request(prompt, Sampling(STEPS, 0.8), row) for prompt, row in zip(PROMPTS, uniforms, strict=True)]
        sampled = replicas.generate([*asked, Request(PROMPTS[0], Sampling(5, 0.8, top_p=0.6), uniforms[1])])
        if size == layout[0]:
            sampled += replicas.generate([Request(PROMPTS[1], Sampling(5, 0.8, repetition_penalty=3.0), uniforms[2])])
        shared = {tensor.untyped_storage().data_ptr() for tensor in named_weights(model).values()}
        views = sum(tensor.untyped_storage().data_ptr() in shared for tensor in replicas.resharder.weights().values())
        found.append(([one.tokens for one in greedy], sampled, replicas.report, views / len(replicas.resharder.shapes)))
    return found


CASES = {
    1: [((1, 1, 1), 1)],
    2: [((2, 1, 1), 2), ((2, 1, 1), 1), ((1, 2, 1), 1), ((1, 2, 1), 2), ((1, 2, 2), 1)],
    4: [((2, 2, 1), 1), ((2, 2, 1), 2), ((2, 2, 1), 4), ((2, 1, 1), 1)],
}
"""By world size; the last is TP 2 x DP 2."""


def test_every_layout_generates_what_one_rank_and_hugging_face_do(small):
    """Greedy: Hugging Face's tokens. Sampled: the same draws, the same tokens. Where layouts agree
    nothing is copied."""
    folder, expected, eos = small
    alone = run(ours, 1, 1, 1, folder, CASES[1], eos)[0][0][1]
    for world, cases in CASES.items():
        for rank in run(ours, 1, 1, world, folder, cases, eos):
            for (layout, size), (greedy, sampled, report, views) in zip(cases, rank, strict=True):
                assert greedy == expected, (layout, size)
                assert [one.tokens for one in sampled] == [one.tokens for one in alone][: len(sampled)], (layout, size)
                assert torch.allclose(torch.tensor(sampled[1].logprobs), torch.tensor(alone[1].logprobs), atol=1e-5)
                assert report["rollout_tokens_per_second"] > 0
                if layout[1] == 1 and size == layout[0]:
                    assert (views, report["reshard_gb"]) == (1, 0)
                else:
                    assert 0 < views < 1 and report["reshard_gb"] > 0, (layout, size)


def test_every_pipeline_stage_sends_in_every_round():
    """Three stages of two layers to three ranks that want all: two rounds of six messages, not six
    of two through one rank's links."""
    held = [
        {f"decoder.layers.{2 * stage + number}.weight": LocalTensor((4, 4), None) for number in range(2)}
        for stage in range(3)
    ]
    found = rounds(plan(held, 1, 1, None)[0], 1)
    assert [sorted((move.of, move.to) for move in one) for one in found] == [
        [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    ] * 2


def test_a_generation_size_that_does_not_divide_the_model_s_ranks_is_refused(small):
    with pytest.raises(AssertionError, match="generation_tensor_parallel = 2 does not divide the 1 ranks"):
        run(ours, 1, 1, 1, small[0], [((1, 1, 1), 2)], 3)


def small_benchmark():
    path = Path(__file__).parents[3] / "benchmarks/generation/rollout.py"
    spec = importlib.util.spec_from_file_location("rollout_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for step in (module.kernels, module.agree, module.step, module.cases, module.peer):
        step(small=True)
    return module.missed


def test_the_benchmark_runs_on_a_cpu():
    assert run(small_benchmark, 1, 1, 1) == [[]]
