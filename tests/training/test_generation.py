"""Generation with a key-value cache against Hugging Face's, for ragged prompts, on every layout; and its sampling."""

import pytest
import torch

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.bloom import tiny_bloom
from tests.distributed import run
from tests.llama import tiny_llama
from training import checkpoint
from training.config import Paths, SFTConfig
from training.data.batches import collate_prompts
from training.generation.rollout import draws, generate, greedy, inverse_cdf
from training.shape import Shape
from training.step import build_model

VOCAB, PAD, STEPS = 300, 3, 12
PROMPTS = [[5, 17, 200], [44, 8, 9, 150, 299, 12, 60], [7], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module", params=[tiny_bloom, tiny_llama])
def small(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    model = request.param(folder / "hf", heads=6, hidden=48, vocab=VOCAB)
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf"))))
    return folder, model


def ours(folder, layout, prompts, choose, eos_id, steps=STEPS):
    settings = SFTConfig(paths=Paths("", "", "", "", ""), precision="fp32", tensor_parallel=layout[0], pipeline_parallel=layout[1])
    model = build_model(Shape.read(folder / "hf"), settings, "lm")
    checkpoint.load_weights(checkpoint.resolve(folder / "convert") / "model", model)
    return generate(model, *collate_prompts(prompts, PAD), steps, choose, eos_id, PAD)


def theirs(model, prompt, eos_id):
    """Hugging Face's greedy continuation of one prompt alone: no padding at all."""
    with torch.no_grad():
        tokens = model.generate(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                do_sample=False, max_new_tokens=STEPS, eos_token_id=eos_id, pad_token_id=PAD)
    response = tokens[0, len(prompt) :].tolist()
    return response + [PAD] * (STEPS - len(response))


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_greedy_equals_hugging_face_one_prompt_at_a_time(small, layout):
    folder, model = small
    free = [theirs(model, prompt, eos_id=None) for prompt in PROMPTS]
    eos = free[1][4]  # a token that the second prompt's continuation holds: it ends early, others go on
    expected = [theirs(model, prompt, eos) for prompt in PROMPTS]
    assert PAD in expected[1] and any(PAD not in row for row in expected)
    for responses in run(ours, *layout, 1, folder, layout, PROMPTS, greedy, eos):
        assert responses.tolist() == expected


def test_a_row_s_sample_does_not_depend_on_its_neighbours_or_the_layout(small):
    folder, _ = small
    uniforms = draws(seed=1, iteration=3, rows=4, steps=STEPS)
    together = run(ours, 1, 1, 1, folder, (1, 1), PROMPTS, inverse_cdf(uniforms, 0.8), -1)[0]
    for row, prompt in enumerate(PROMPTS):
        alone = run(ours, 1, 1, 1, folder, (1, 1), [prompt], inverse_cdf(uniforms[row : row + 1], 0.8), -1)[0]
        assert torch.equal(alone[0], together[row])
    for responses in run(ours, 2, 2, 1, folder, (2, 2), PROMPTS, inverse_cdf(uniforms, 0.8), -1):
        assert torch.equal(responses, together)


def test_sampling_follows_the_distribution():
    """Pearson's chi-square of 20,000 draws at temperature .7 against the softmax; 15 degrees of freedom, 99.9% point 37.7."""
    logits = torch.linspace(-2, 2, 16)
    uniforms = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    counts = inverse_cdf(uniforms, 0.7)(logits.expand(20_000, -1), 0).bincount(minlength=16)
    expected = 20_000 * (logits / 0.7).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 37.7


def test_sampling_never_picks_what_has_no_probability():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]])
    picked = {int(inverse_cdf(torch.tensor([[u]]), 1.0)(logits, 0)) for u in (0.0, 0.2, 0.5, 0.999, 1 - 2**-24)}
    assert picked == {1, 3}
