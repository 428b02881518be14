"""One PPO iteration's samples: generated, scored by four models, turned into advantages. Between the phases: named tuples.

Every rank of a pipeline holds the same tensors of its data-parallel part, so that no phase needs to ask another rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from training import losses, parallel
from training.config import PPOConfig
from training.data.batches import Example, collate, collate_prompts, padded_length
from training.data.tokenizer import Tokenizer
from training.generation.rollout import generate, inverse_cdf
from training.model.bloom import Bloom
from training.model.heads import next_token_logprobs
from training.reward import read_last
from training.start import length_multiple
from training.step import Batch, evaluate


class Rollout(NamedTuple):
    """Prompts with sampled responses, right-padded."""

    batch: Batch
    """"tokens" (B, T), "response_mask" (B, T), "lengths" (B,); the response includes its EOS."""
    ended: torch.Tensor
    """(B,) True where the response has an EOS."""


class Experience(NamedTuple):
    """What PPO learns from, (B, T) each unless said otherwise, aligned with the token they speak of."""

    batch: Batch
    """tokens, response_mask, old_logprobs, old_values, advantages (whitened), returns."""
    metrics: dict[str, float]
    """Means over the iteration's samples on all ranks."""


@dataclass(frozen=True)
class Models:
    """The four models of PPO. ``policy`` and ``value`` learn; ``reference`` and ``reward`` are frozen."""

    policy: Bloom
    reference: Bloom
    reward: Bloom
    value: Bloom


def roll_out(config: PPOConfig, policy: Bloom, prompts: list[list[int]], uniforms: torch.Tensor, tokenizer: Tokenizer) -> Rollout:
    """Sample a response to each of this data-parallel rank's ``prompts`` with its row of ``uniforms`` (B, response_length)."""
    examples, ended = [], []
    for first in range(0, len(prompts), config.generation_batch_size):
        chunk = prompts[first : first + config.generation_batch_size]
        tokens, prompt_mask = collate_prompts(chunk, tokenizer.pad_id)
        choose = inverse_cdf(uniforms[first : first + len(chunk)], config.temperature)
        responses = generate(policy, tokens, prompt_mask, config.response_length, choose, tokenizer.eos_id, tokenizer.pad_id)
        for prompt, response in zip(chunk, responses.tolist(), strict=True):
            has_eos = tokenizer.eos_id in response
            response = response[: response.index(tokenizer.eos_id) + 1] if has_eos else response
            examples.append(Example(prompt + response, len(prompt)))
            ended.append(has_eos)
    length = padded_length([len(example.tokens) for example in examples], length_multiple(config))
    return Rollout(collate(examples, tokenizer.pad_id, length), torch.tensor(ended))


def state_values(outputs: torch.Tensor) -> torch.Tensor:
    """Value head's outputs (B, T) -> values aligned with the token chosen in that state: the output one position earlier."""
    return torch.nn.functional.pad(outputs[:, :-1], (1, 0))


class Scored(NamedTuple):
    """A rollout seen by the four models; CPU, (B, T) unless said otherwise."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    """(B,) the reward model's, before bias, clip and penalty."""


def score(config: PPOConfig, models: Models, batch: Batch) -> Scored:
    """Recompute log-probabilities with the training forward (not the rollout's), values, and the reward at the last real token."""

    def logprobs(output, micro):
        return next_token_logprobs(output, micro["tokens"], config.temperature, micro["response_mask"])

    def head(values, micro):
        return values

    size = config.micro_batch_size
    rewards = evaluate(models.reward, batch, size, head).cpu()
    return Scored(evaluate(models.policy, batch, size, logprobs).cpu(), evaluate(models.reference, batch, size, logprobs).cpu(),
                  state_values(evaluate(models.value, batch, size, head).cpu()), read_last(rewards, batch))


def calibrate(rollout: Rollout, scored: Scored) -> float | None:
    """Bias with which the responses that ended score 0 on average: taken once, while the policy still is the SFT model.

    None where no response on any rank has ended: the next iteration tries again. A collective.
    """
    ended = rollout.ended.double()
    total, count = parallel.sum_over_data(_here((scored.scores * ended).sum(), ended.sum())).tolist()
    return -total / count if count else None


def experience(config: PPOConfig, rollout: Rollout, scored: Scored, kl_coef: float, reward_bias: float) -> Experience:
    """Per-token rewards, advantages whitened over all response tokens of the iteration on all ranks, returns, and the report."""
    mask = rollout.batch["response_mask"]
    scores = final_scores(config, rollout, scored, reward_bias)
    rewards = losses.token_rewards(scored.logprobs, scored.ref_logprobs, scores, mask, kl_coef)
    advantages, returns = losses.gae(rewards, scored.values, mask, config.gamma, config.lam)
    mean, variance = moments(advantages, mask)
    _, returns_variance = moments(returns, mask)
    _, residual_variance = moments(returns - scored.values, mask)
    batch = {**rollout.batch, "old_logprobs": scored.logprobs, "old_values": scored.values, "returns": returns,
             "advantages": losses.whiten(advantages, mean, variance, mask)}
    metrics = report(rollout, scored, config, reward_bias)
    metrics["explained_variance"] = 1 - float(residual_variance / returns_variance.clamp(min=1e-8))
    return Experience(batch, metrics)


def moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of ``values`` where ``mask``, over all data-parallel ranks, in double precision."""
    chosen = values.double()[mask]
    total, count = parallel.sum_over_data(_here(chosen.sum(), chosen.numel())).cpu()
    mean = total / count
    (square,) = parallel.sum_over_data(_here(((chosen - mean) ** 2).sum())).cpu()
    return mean.float(), (square / count).float()


def final_scores(config: PPOConfig, rollout: Rollout, scored: Scored, reward_bias: float) -> torch.Tensor:
    """(B,) the reward model's scores with bias and clip; ``missing_eos_penalty`` where the response has no EOS."""
    scores = (scored.scores + reward_bias).clamp(-config.reward_clip, config.reward_clip)
    return torch.where(rollout.ended, scores, config.missing_eos_penalty)


def report(rollout: Rollout, scored: Scored, config: PPOConfig, reward_bias: float) -> dict[str, float]:
    """Means over samples: reward, KL to the reference per response in nats (k1 and k3), EOS rate, length, repetition."""
    mask, scores = rollout.batch["response_mask"], final_scores(config, rollout, scored, reward_bias)
    responses = [row[inside].tolist() for row, inside in zip(rollout.batch["tokens"], mask, strict=True)]
    per_row = {
        "reward": scores, "reward_square": scores.double() ** 2,
        "kl": (losses.kl_k1(scored.logprobs, scored.ref_logprobs) * mask).sum(1),
        "kl_k3": (losses.kl_k3(scored.logprobs, scored.ref_logprobs) * mask).sum(1),
        "eos_rate": rollout.ended, "response_length": mask.sum(1),
        "repeated_ngrams": torch.tensor([repeated_ngrams(response) for response in responses]),
    }
    sums = parallel.sum_over_data(_here(*(values.double().sum() for values in per_row.values()), mask.size(0))).tolist()
    means = {name: value / sums[-1] for name, value in zip(per_row, sums, strict=False)}
    means["reward_std"] = max(means.pop("reward_square") - means["reward"] ** 2, 0.0) ** 0.5
    return means


def repeated_ngrams(tokens: list[int], n: int = 3) -> float:
    """Share of a response's n-grams that stood there before, 0..1."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def timed(function, *args):
    """The function's result and its wall-clock seconds."""
    began = time.monotonic()
    return function(*args), time.monotonic() - began


def _here(*values) -> torch.Tensor:
    """Numbers as one double tensor on this rank's device, ready to be summed over ranks."""
    return torch.stack([torch.as_tensor(value, dtype=torch.double) for value in values]).to(parallel.device())
