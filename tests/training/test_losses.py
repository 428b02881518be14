"""The mathematics against hand-computed cases and plain loops."""

import doctest
import math
import re

import pytest
import torch
import torch.nn.functional as F

from training import losses


def test_pairwise_loss_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    rewards = torch.randn(5, 4, dtype=torch.double)
    scores = torch.tensor(
        [[3, 1, 2, 2], [1, 1, 1, 1], [0, math.nan, 5, math.nan], [1, 2, 3, 4], [4, 4, 1, 1]], dtype=torch.double
    )
    loss, accuracy, margin, valid = losses.pairwise_loss(rewards, scores)
    for query in range(5):
        pairs = [(i, j) for i in range(4) for j in range(4) if scores[query, i] > scores[query, j]]
        assert valid[query] == bool(pairs)
        margins = torch.stack([rewards[query, i] - rewards[query, j] for i, j in pairs]) if pairs else torch.zeros(1)
        expected = (-F.logsigmoid(margins)).mean() if pairs else torch.tensor(0.0)
        assert loss[query] == pytest.approx(expected.item(), abs=1e-12)
        assert accuracy[query] == pytest.approx((margins > 0).float().mean().item())
        assert margin[query] == pytest.approx(margins.mean().item(), abs=1e-12)


def test_gae_equals_a_hand_computed_case():
    # One response of three tokens at positions 1..3; gamma .9, lambda .5; last value bootstraps to
    # 0.
    rewards, values = torch.tensor([[9.0, 1.0, 0.0, 2.0, 9.0]]), torch.tensor([[9.0, 0.5, 0.4, 0.2, 9.0]])
    mask = torch.tensor([[False, True, True, True, False]])
    advantages, returns = losses.gae(rewards, values, mask, 0.9, 0.5)
    third = 2.0 - 0.2
    second = 0.0 + 0.9 * 0.2 - 0.4 + 0.45 * third
    first = 1.0 + 0.9 * 0.4 - 0.5 + 0.45 * second
    assert torch.allclose(advantages, torch.tensor([[0.0, first, second, third, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[0.0, first + 0.5, second + 0.4, third + 0.2, 0.0]]))


def test_gae_does_not_depend_on_padding():
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 6), torch.randn(3, 6)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    short = losses.gae(rewards, values, mask, 1.0, 0.95)
    wide = losses.gae(
        *(F.pad(x, (0, 4), value=v) for x, v in ((rewards, 7.0), (values, 7.0), (mask, False))), 1.0, 0.95
    )
    for a, b in zip(short, wide, strict=True):
        assert torch.equal(a, b[:, :6]) and not b[:, 6:].any()


def test_the_score_lands_on_the_last_response_token_and_the_penalty_on_response_tokens_only():
    logprobs, reference = torch.full((2, 5), -1.0), torch.full((2, 5), -1.5)
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    rewards = losses.token_rewards(logprobs, reference, torch.tensor([2.0, -3.0]), mask, kl_coef=0.1)
    expected = torch.tensor([[0, -0.05, 1.95, 0, 0], [0, 0, -0.05, -0.05, -3.05]])
    assert torch.allclose(rewards, expected)


def test_first_minibatch_has_ratio_one():
    torch.manual_seed(2)
    logprobs = -torch.rand(4, 6)
    mask = torch.rand(4, 6) > 0.4
    advantages = torch.randn(4, 6)
    count = mask.sum()
    mean = advantages[mask].mean()
    white = losses.whiten(advantages, mean, ((advantages[mask] - mean) ** 2).mean(), mask)
    loss, clipped, approx_kl = losses.policy_loss(logprobs, logprobs.clone(), white, mask, 0.2)
    assert abs(loss / count) < 1e-7 and clipped == 0 and approx_kl == 0


@pytest.mark.parametrize("dual", [0.0, 1.5])
def test_policy_loss_equals_the_formula_token_by_token(dual):
    torch.manual_seed(3)
    new, old, advantages = -torch.rand(3, 5), -2 * torch.rand(3, 5), torch.randn(3, 5)
    mask = torch.rand(3, 5) > 0.3
    expected = clipped = 0.0
    for i, t in mask.nonzero().tolist():
        ratio = math.exp(new[i, t] - old[i, t])
        bounded = min(max(ratio, 0.8), 1.2)
        objective = min(ratio * advantages[i, t].item(), bounded * advantages[i, t].item())
        expected -= max(objective, dual * advantages[i, t].item()) if dual and advantages[i, t] < 0 else objective
        clipped += bounded * advantages[i, t].item() < ratio * advantages[i, t].item()
    loss, fraction, _ = losses.policy_loss(new, old, advantages, mask, 0.2, dual)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and fraction.item() == clipped


def test_value_loss_is_the_worse_of_clipped_and_unclipped():
    mask = torch.tensor([[True, True, False]])
    loss = losses.value_loss(
        torch.tensor([[1.0, 0.05, 9.0]]), torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), mask, clip=0.1
    )
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.05**2))


def test_kl_estimators_agree_with_the_exact_divergence_in_the_mean():
    torch.manual_seed(4)
    p, q = torch.randn(8).log_softmax(0), torch.randn(8).log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * losses.kl_k1(p, q)).sum() == pytest.approx(exact.item(), rel=1e-5)
    assert (p.exp() * losses.kl_k3(p, q)).sum() == pytest.approx(exact.item(), rel=1e-5)
    assert (losses.kl_k3(p, q) >= 0).all()


@pytest.mark.parametrize(
    "name", [name for name, found in vars(losses).items() if getattr(found, "__module__", "") == losses.__name__]
)
def test_each_function_s_worked_example(name):
    """Shapes, source and an example with numbers are in the docstring; the example is run."""
    text = " ".join(getattr(losses, name).__doc__.split())
    assert re.search(r"\(.*\d{4}|baselines", text) and re.search(
        r"\(B, T\)|\(B,\)|\(Q, K\)|any shape|nats", text, re.IGNORECASE
    )
    (example,) = doctest.DocTestFinder(recurse=False).find(
        getattr(losses, name), name, losses, globs=dict(vars(losses))
    )
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (60.0, 0.1 * (1 + 0.2 * 64 / 1000)), (0.0, 0.1 * (1 - 0.2 * 64 / 1000))]
)
def test_adaptive_kl_moves_by_at_most_a_fifth_a_horizon(kl, expected):
    assert losses.adaptive_kl_coef(0.1, kl, 6.0, 64, 1000) == pytest.approx(expected)
