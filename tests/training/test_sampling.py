"""Sampling from logits: the distribution, its truncations and the repetition penalty against Hugging Face's, log-probabilities."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from training.generation.request import draws
from training.generation.sampling import choose, penalise, truncate

ROWS = 20_000


def pick(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    rows = len(logits)
    truncation = (torch.full((rows,), top_k), torch.full((rows,), top_p)) if top_k or top_p < 1 else ()
    return choose(logits, torch.full((rows,), temperature), uniforms, *truncation)


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "alive"), [
    (0.7, 0, 1.0, 16), (1.0, 6, 1.0, 6), (1.3, 0, 0.7, 6), (0.9, 9, 0.8, 5),
])
def test_sampling_follows_the_distribution(temperature, top_k, top_p, alive):
    """Pearson's chi-square of 20,000 draws against Hugging Face's warped softmax; at most the 99.9% point of its degrees of freedom."""
    logits = torch.linspace(-2, 2, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    warped = (logits / temperature)[None]
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = ROWS * warped[0].softmax(-1)
    assert int((expected > 0).sum()) == alive
    tokens, logprobs = pick(logits.expand(ROWS, -1), draws(3, 1, ROWS, 1)[:, 0], temperature, top_k, top_p)
    counts = tokens.bincount(minlength=16)
    assert not counts[expected == 0].any()
    inside = expected > 0
    limit = {16: 37.7, 6: 20.5, 5: 18.5}[alive]
    assert ((counts - expected)[inside] ** 2 / expected[inside]).sum() < limit
    assert torch.allclose(logprobs, (logits / temperature).log_softmax(-1)[tokens]), "before truncation"


def test_truncation_is_hugging_face_s():
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 3
    for top_k, top_p in ((1, 1.0), (7, 1.0), (0, 0.01), (0, 0.9), (40, 0.6), (1000, 0.999)):
        expected = logits
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        found = truncate(logits, torch.full((200,), top_k), torch.full((200,), top_p))
        assert torch.equal(found, expected), (top_k, top_p)


def test_equals_stay_or_go_together():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, 2.0, 0.0]])
    none, all_ = torch.tensor([0]), torch.tensor([1.0])
    assert (truncate(logits, torch.tensor([1]), all_) > -1e9).tolist() == [[False, True, True, False, False, False]]
    assert (truncate(logits, none, torch.tensor([0.75])) > -1e9).tolist() == [[False, True, True, True, True, False]]
    assert (truncate(logits, none, torch.tensor([0.5])) > -1e9).tolist() == [[False, True, True, False, False, False]]


def test_rows_that_truncate_stand_beside_rows_that_do_not():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    found = truncate(logits, torch.tensor([0, 3, 0, 3]), torch.tensor([1.0, 1.0, 0.2, 0.2]))
    assert torch.equal(found[0], logits[0]) and int((found[1] > -1e9).sum()) == 3
    assert torch.equal(found[3], TopPLogitsWarper(0.2)(None, TopKLogitsWarper(3)(None, logits[3:]))[0])


def test_the_repetition_penalty_is_hugging_face_s():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 5, 5, 7], [0, 2, 4, 19], [3, 3, 3, 3]])
    seen = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, tokens, True)
    assert torch.equal(penalise(logits, seen, torch.full((3,), 1.3)), RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits))


def test_greedy_takes_the_first_of_equals_and_its_probability_at_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0]])
    token, logprob = pick(logits, torch.tensor([0.99]), temperature=0.0)
    assert int(token) == 1 and logprob == logits.log_softmax(-1)[:, 1]


def test_what_has_no_probability_is_never_picked():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]])
    assert {int(pick(logits, torch.tensor([u]))[0]) for u in (0.0, 0.2, 0.5, 0.999, 1 - 2**-24)} == {1, 3}


def test_draws_are_those_of_the_global_batch():
    """Rows keep their draws whatever part of the batch a rank has; another iteration has others."""
    whole = draws(7, 2, 6, 5)
    assert torch.equal(whole, draws(7, 2, 6, 5)) and not torch.equal(whole, draws(7, 3, 6, 5))
    assert whole.min() >= 0 and whole.max() < 1
