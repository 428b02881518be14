"""The mathematics of SFT, reward model and PPO: pure functions, tensors in, tensors out.

Per-token tensors are (B, T) and aligned with the token they speak of: ``logprobs[:, t]`` = log
p(token t | tokens before t), ``values[:, t]`` = value of the state in which token t was chosen.
``response_mask`` is True at response tokens, EOS included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def logistic_loss(margin: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log sigmoid(r_i - r_j), the negative log-likelihood of Bradley and Terry's model, any shape
    (Ouyang et al. 2022, eq. 1; with DPO's implicit rewards Rafailov et al. 2023, eq. 7).

    ``label_smoothing`` is the probability that a pair is the wrong way round (Mitchell 2023).

    >>> logistic_loss(torch.tensor([0.0, 2.0, 2.0]), 0.1)
    tensor([0.6931, 0.3269, 0.3269])
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(margin: torch.Tensor, beta: float) -> torch.Tensor:
    """(h - 1 / (2 beta))^2 with h = ``margin`` / beta, by how much the log ratios of a pair's whole
    replies differ (Azar et al. 2024, eq. 17): they are to be apart by so much, not by ever more.
    Any shape.

    The example asks for a distance of 1 in log ratios.

    >>> ipo_loss(torch.tensor([0.0, 0.5, 1.0]), beta=0.5)
    tensor([1., 0., 1.])
    """
    return (margin / beta - 1 / (2 * beta)) ** 2


def pairwise_loss(
    rewards: torch.Tensor,
    scores: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor] = logistic_loss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranking loss over the replies to each query: rewards (Q, K), scores (Q, K); higher is better.

    Equal scores form no pair, nor does a score of NaN (a reply that only fills up the row).
    Returns, each (Q,): the mean of ``loss(r_i - r_j)`` over the query's valid pairs (Ouyang et al.
    2022, eq. 1), the pairs' accuracy, their mean margin, and whether the query has a pair at all
    (where not, the others are 0).

    The example has two pairs: rewards 2 against 0 and 2 against 1.

    >>> pairwise_loss(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[5.0, 1.0, 1.0]]))
    (tensor([0.2201]), tensor([1.]), tensor([1.5000]), tensor([True]))
    """
    margin = rewards[:, :, None] - rewards[:, None, :]
    pair = scores[:, :, None] > scores[:, None, :]
    pairs = pair.sum((1, 2))

    def mean(values):
        return (values * pair).sum((1, 2)) / pairs.clamp(min=1)

    return mean(loss(margin)), mean((margin > 0).float()), mean(margin), pairs > 0


def kl_k1(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token log p - log p_ref on p's own samples, any shape: unbiased, may be negative
    (Schulman 2020, k1).

    >>> kl_k1(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    tensor([0.6931])
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token (r - 1) - log r with r = p_ref / p, any shape: unbiased and never negative
    (Schulman 2020, k3).

    >>> kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())  # 0.5 - 1 + log 2
    tensor([0.1931])
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.expm1() - log_ratio


def token_rewards(logprobs, ref_logprobs, scores, response_mask, kl_coef: float) -> torch.Tensor:
    """Rewards (B, T): -kl_coef * k1 at each response token, plus ``scores`` (B,) at the last one
    (Ouyang et al. 2022, eq. 2). ``logprobs``, ``ref_logprobs``, ``response_mask`` (B, T).

    >>> logprobs, reference = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -2.0, -1.0]])
    >>> mask = torch.tensor([[False, True, True]])
    >>> token_rewards(logprobs, reference, torch.tensor([5.0]), mask, kl_coef=0.1)[:, 1:]
    tensor([[-0.1000,  5.0000]])
    """
    rewards = -kl_coef * kl_k1(logprobs, ref_logprobs) * response_mask
    return rewards.scatter_add(1, last_token(response_mask), scores[:, None].to(rewards.dtype))


def last_token(response_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, 1): the place of each row's last response token, where the score stands (Ouyang
    et al. 2022, eq. 2).

    >>> last_token(torch.tensor([[False, True, True, False]]))
    tensor([[2]])
    """
    return (response_mask * torch.arange(response_mask.size(1), device=response_mask.device)).argmax(1, keepdim=True)


def gae(rewards, values, response_mask, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over response tokens only ->
    advantages, returns (B, T).

    The value after the last response token is 0; outside the mask both results are 0. ``rewards``,
    ``values``, ``response_mask`` (B, T).

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[9.0, 0.5, 0.5]])
    >>> gae(rewards, values, torch.tensor([[False, True, True]]), gamma=1.0, lam=0.5)
    (tensor([[0.0000, 0.2500, 0.5000]]), tensor([[0.0000, 0.7500, 1.0000]]))
    """
    advantages = torch.zeros_like(values)
    carried = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        inside = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(inside, delta + gamma * lam * carried, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = carried
    return advantages, (advantages + values) * response_mask


def whiten(advantages, mean: torch.Tensor, variance: torch.Tensor, response_mask) -> torch.Tensor:
    """(A - mean) / std at response tokens, 0 elsewhere, (B, T); ``mean`` and ``variance`` () are
    those of the whole iteration on all ranks (the "advantage normalisation" of Andrychowicz et al.
    2021, C67, over the iteration instead of the minibatch).

    >>> mask = torch.tensor([[False, True, True]])
    >>> whiten(torch.tensor([[7.0, 1.0, 3.0]]), torch.tensor(2.0), torch.tensor(1.0), mask)
    tensor([[ 0., -1.,  1.]])
    """
    return (advantages - mean) * (variance + 1e-8).rsqrt() * response_mask


def group_advantages(scores: torch.Tensor, group_size: int, scale: bool = True) -> torch.Tensor:
    """Advantage (B,) of each of ``group_size`` adjacent samples to one prompt: score less the
    group's mean, over the group's standard deviation + 1e-4 (Shao et al. 2024, section 4.1.2).
    ``scale`` False leaves the division out, which weighs prompts by how much their samples agree
    (Dr. GRPO: Liu et al. 2025).

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([-0.7071,  0.7071,  0.0000,  0.0000])
    """
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if scale else centred).flatten()


def importance_weights(old_logprobs, behaviour_logprobs, cap: float) -> torch.Tensor:
    """min(p_old / p_behaviour, ``cap``), any shape: what a sample drawn from another distribution
    counts (truncated importance sampling, Ionides 2008; between rollout and training Yao et al.
    2025).

    >>> training, rollout = torch.tensor([0.5, 0.1, 0.8]), torch.tensor([0.25, 0.2, 0.1])
    >>> importance_weights(training.log(), rollout.log(), cap=3.0)
    tensor([2.0000, 0.5000, 3.0000])
    """
    return (old_logprobs - behaviour_logprobs).exp().clamp(max=cap)


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    response_mask,
    clip: float,
    dual_clip: float = 0.0,
    clip_high: float = 0.0,
    weights: torch.Tensor | None = None,
):
    """Sum over response tokens of PPO's clipped objective (Schulman et al. 2017, eq. 7) -> loss,
    clip fraction sum, approx KL sum.

    All (B, T). ``dual_clip`` c > 1 bounds the loss of a token with negative advantage by -c A (Ye
    et al. 2020, eq. 5): its ratio may be anything, and the clip above only bounds what is gained; 0
    = off. The ratio is clipped to [1 - ``clip``, 1 + ``clip_high``]; 0 = the same as below (Yu et
    al. 2025, eq. 10). Each token's loss counts ``weights`` (B, T) times. Approx KL is k3 of old
    against new policy.

    The example's losses are -1.2 + 1.5 + 8, and with ``dual_clip`` -1.2 + 1.5 + 3.

    >>> ratio, advantages = torch.tensor([[1.5, 1.5, 8.0]]), torch.tensor([[1.0, -1.0, -1.0]])
    >>> new, old, mask = ratio.log(), torch.zeros(1, 3), torch.ones(1, 3).bool()
    >>> policy_loss(new, old, advantages, mask, clip=0.2)
    (tensor(8.3000), tensor(1), tensor(5.1096))
    >>> policy_loss(new, old, advantages, mask, clip=0.2, dual_clip=3.0)[0]
    tensor(3.3000)
    """
    log_ratio = (logprobs - old_logprobs) * response_mask
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + (clip_high or clip))
    losses = torch.maximum(unclipped, clipped)
    if dual_clip:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        losses = losses * weights
    clip_fraction = ((clipped > unclipped) & response_mask).sum()
    return (losses * response_mask).sum(), clip_fraction, ((log_ratio.expm1() - log_ratio) * response_mask).sum()


def value_loss(values, old_values, returns, response_mask, clip: float) -> torch.Tensor:
    """Sum over response tokens of 0.5 max((V - R)^2, (clip(V, V_old +- clip) - R)^2): the clipped
    objective's counterpart for values (Schulman et al.'s code, OpenAI baselines' ppo2; Andrychowicz
    et al. 2021, C12). All (B, T). ``clip`` 0: 0.5 (V - R)^2.

    >>> values, old_values = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]])
    >>> returns, mask = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2).bool()
    >>> value_loss(values, old_values, returns, mask, clip=0.1)
    tensor(2.0800)
    >>> value_loss(values, old_values, returns, mask, clip=0.0)
    tensor(2.)
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip) if clip else values
    return 0.5 * (torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) * response_mask).sum()


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Next coefficient of the proportional controller (Ziegler et al. 2019, section 2.2); ``kl``
    and ``target`` in nats per response, ``samples`` in the iteration, ``horizon`` in samples.

    A KL 10% above the target raises the coefficient by 1%.

    >>> adaptive_kl_coef(0.1, kl=6.6, target=6.0, samples=100, horizon=1000)
    0.101
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * samples / horizon)
