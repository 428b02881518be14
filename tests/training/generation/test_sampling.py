"""Sampling from logits: the distribution, its truncations and the repetition penalty against
Hugging Face's, log-probabilities."""

import pytest
import torch
import torch.distributed as dist
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from tests.support.distributed import run
from tests.support.generation_models import NONE, off, shard
from training.generation import torch_ops, tp_sampling
from training.generation.request import draws
from training.generation.sampling import choose, penalise, truncate

ROWS = 20_000


def pick(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    rows = len(logits)
    truncation = (torch.full((rows,), top_k), torch.full((rows,), top_p)) if top_k or top_p < 1 else ()
    return choose(logits, torch.full((rows,), temperature), uniforms, *truncation)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "alive"),
    [
        (0.7, 0, 1.0, 16),
        (1.0, 6, 1.0, 6),
        (1.3, 0, 0.7, 6),
        (0.9, 9, 0.8, 5),
    ],
)
def test_sampling_follows_the_distribution(temperature, top_k, top_p, alive):
    """Pearson's chi-square of 20,000 draws against Hugging Face's warped softmax; at most the 99.9%
    point of its degrees of freedom."""
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
    assert torch.equal(
        penalise(logits, seen, torch.full((3,), 1.3)), RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits)
    )


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


VOCAB = 700
"""Of two ranks: 384 columns and 316; of four: 256 twice, 188, and a rank that has only padding."""


def hard_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, temperatures, uniforms, the only right token or -1) of rows that ranks could choose
    differently for."""
    flat = torch.full((VOCAB,), NONE)
    flat[:512] = 0  # each weighs 1/512: sums are exact
    low, high = flat.clone(), flat.clone()
    low[250:512], high[:600] = NONE, NONE  # a whole rank's columns weigh nothing
    high[600:] = 0
    far, peaks, holes = (
        torch.full((VOCAB,), -1e4),
        torch.randn(VOCAB, generator=torch.Generator().manual_seed(4)),
        flat.clone(),
    )
    far[[300, 650]] = 1e4
    peaks[[255, 256, 384, 699]] = 9.0
    holes[[0, 255, 256, 257, 383, 384, 511]] = NONE
    last = 1 - 2**-24
    # a draw on an edge goes to what follows it
    rows = [(flat, 1.0, k / 512, k) for k in (0, 1, 255, 256, 257, 383, 384, 385, 511)]
    rows += [(flat, 1.0, k / 512 - 2**-24, k - 1) for k in (1, 256, 257, 384, 385, 511)] + [(flat, 1.0, last, 511)]
    rows += [(low, 1.0, u, -1) for u in (0.0, 0.5, last)] + [(high, 0.7, 0.0, 600), (high, 0.7, last, 699)]
    rows += [
        (far, 1.0, 0.0, 300),
        (far, 1.0, 0.49, 300),
        (far, 1.0, 0.51, 650),
        (far, 1.0, last, 650),
        (far, 0.0, 0.9, 300),
    ]
    rows += [
        (peaks, 0.0, 0.99, 255),
        (high, 0.0, 0.3, 600),
        (flat, 0.0, 0.0, 0),
        (holes, 1.0, 0.0, 1),
        (holes, 1.0, last, 510),
    ]
    logits, temperature, uniforms, right = zip(*rows, strict=True)
    return torch.stack(logits), torch.tensor(temperature), torch.tensor(uniforms), torch.tensor(right)


def many_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3000, VOCAB, generator=generator) * torch.linspace(0.1, 8, 3000)[:, None]
    uniforms = torch.rand(3000, generator=generator)
    uniforms[1::10] = 1 - 2**-24  # sums in another order may end below it
    return logits, torch.linspace(0.3, 1.5, 3000) * (torch.arange(3000) % 10 > 0), uniforms


def chosen_from_shards():
    group = dist.group.WORLD
    return [
        tp_sampling.choose(torch_ops, shard(logits, group.rank(), group.size()), temperature, uniforms, group)
        for logits, temperature, uniforms in (hard_rows()[:3], many_rows())
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_with_some_columns_each_choose_what_one_with_all_does(ranks):
    first, *others = run(chosen_from_shards, 1, 1, ranks)
    for other in others:
        assert all(
            torch.equal(x, y)
            for mine, theirs in zip(first, other, strict=True)
            for x, y in zip(mine, theirs, strict=True)
        )
    *given, right = hard_rows()
    tokens, logprobs = first[0]
    assert torch.equal(tokens[right >= 0], right[right >= 0])
    expected, exact = choose(*given)
    assert torch.equal(tokens, expected) and torch.allclose(logprobs, exact, atol=1e-5)
    wrong, error = off(*first[1], *many_rows())
    assert wrong == 0 and error < 1e-5
    differ = (first[1][0] != choose(*many_rows())[0]).nonzero()[:, 0]
    assert len(differ[differ % 10 != 1]) <= 3, "draws within rounding of the border between two tokens"
