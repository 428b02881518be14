"""One PPO iteration's samples: generated, scored by four models, turned into advantages. Between
the phases: named tuples.

Every rank holds the samples of all ranks, so that no later phase asks another rank for its part:
whitening and means are over the whole iteration by construction. 1,024 samples of 1,536 tokens are
40 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from training import losses
from training.config.trainers import PPOConfig, RolloutConfig
from training.data.batches import Example, collate, padded_length, shard
from training.data.tokenizer import Tokenizer
from training.distributed import groups
from training.generation.request import Request, Sampling
from training.generation.rollout_workers import Replicas
from training.models import lora
from training.models.heads import next_token_logprobs, read_last
from training.models.language_model import LanguageModel
from training.optim.offload import OffloadedModel
from training.rl import invariants
from training.rl.minibatches import Plan
from training.trainer.setup import length_multiple
from training.trainer.step import Batch


class Rollout(NamedTuple):
    """All ranks' prompts with sampled responses, right-padded."""

    batch: Batch
    """"tokens" (B, T), "response_mask" (B, T), "lengths" (B,); the response includes its EOS."""
    ended: torch.Tensor
    """(B,) True where the response has an EOS."""
    behaviour_logprobs: torch.Tensor
    """(B, T) the rollout engine's log-probability of each response token as it was drawn, 0
    elsewhere: of the whole distribution at the configuration's temperature (which refuses top-p and
    top-k), in fp32 logits from weights of the training's precision."""


class Experience(NamedTuple):
    """What PPO learns from, (B, T) each unless said otherwise, aligned with the token they speak
    of."""

    batch: Batch
    """tokens, response_mask, old_logprobs, old_values, advantages (whitened), returns."""
    metrics: dict[str, float]
    """Means over the iteration's samples."""


@dataclass(frozen=True)
class Models:
    """The four models of PPO. ``policy`` and ``value`` learn; ``reference`` and ``reward`` are
    frozen.

    With low-rank adapters ``reference`` is the policy itself: it is asked without them. Without a
    KL penalty there is none.
    """

    policy: LanguageModel
    reference: LanguageModel | OffloadedModel | None
    reward: LanguageModel | OffloadedModel
    value: LanguageModel | None
    """None: GRPO has none."""


def roll_out(
    config: RolloutConfig, policy: Replicas, prompts: list[list[int]], uniforms: torch.Tensor, tokenizer: Tokenizer
) -> Rollout:
    """Sample a response to each of ``prompts`` with its row of ``uniforms`` (B, response_length);
    ranks share them out. A collective."""
    ranks, count = groups.data_ranks(), len(prompts)
    order = [*range(count), *[count - 1] * (-count % ranks)]
    local = shard(order, groups.data_rank(), ranks)
    sampling = Sampling(config.response_length, config.temperature)
    completions = policy.generate([Request(prompts[index], sampling, uniforms[index]) for index in local])
    replies = [
        (Example([*prompts[index], *one.tokens], len(prompts[index])), one.logprobs)
        for index, one in zip(local, completions, strict=True)
    ]
    everyone: list = [None] * ranks
    dist.all_gather_object(everyone, replies, group=parallel_state.get_data_parallel_group())
    examples, drawn = zip(*[reply for rank in everyone for reply in rank][:count], strict=True)
    length = padded_length([len(example.tokens) for example in examples], length_multiple(config))
    ended = torch.tensor([example.tokens[-1] in policy.stop_ids for example in examples])
    batch = collate(examples, tokenizer.pad_id, length)
    invariants.samples_are_whole(batch, [example.response_start for example in examples], ended, policy.stop_ids)
    behaviour = torch.zeros(batch["tokens"].shape)
    behaviour[batch["response_mask"]] = torch.tensor([logprob for row in drawn for logprob in row])
    return Rollout(batch, ended, behaviour)


def state_values(outputs: torch.Tensor) -> torch.Tensor:
    """Value head's outputs (B, T) -> aligned with the token chosen in that state: the output one
    position earlier."""
    return torch.nn.functional.pad(outputs[:, :-1], (1, 0))


class Scored(NamedTuple):
    """A rollout seen by the four models; CPU, (B, T) unless said otherwise."""

    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor | None
    values: torch.Tensor | None
    """The value head's, before ``value_bias``. None: GRPO has none."""
    scores: torch.Tensor
    """(B,) the reward model's, before bias, clip and penalty; of equal samples the same to the
    bit."""


def score(config: RolloutConfig, models: Models, batch: Batch, rows: Plan) -> Scored:
    """Recompute log-probabilities with the training forward (not the rollout's), values, and the
    reward at the last real token."""

    def logprobs(output, micro):
        return next_token_logprobs(output, micro["tokens"], config.temperature, micro["response_mask"])

    def head(values, micro):
        return values

    # Those that are always on the device stand before the others, whose copies run beside them, one
    # at a time.
    prepare(models.reference)
    values = state_values(rows.look(models.value, batch, head)) if models.value else None
    ref_logprobs = None
    if models.reference:
        with at_work(models.reference) as reference:
            ref_logprobs = rows.look(reference, batch, logprobs)
    prepare(models.reward)
    old_logprobs = rows.look(models.policy, batch, logprobs)
    with at_work(models.reward) as reward:
        scores = read_last(rows.look(reward, batch, head), batch)[first_alike(batch)]
    return Scored(old_logprobs, ref_logprobs, values, scores)


def first_alike(batch: Batch) -> list[int]:
    """For each of the samples (B, T) the number of the first with the same tokens. At another place
    in its row a sample's score is rounded otherwise; in a group of equal replies GRPO would make
    advantages of +-1 of that."""
    seen: dict[tuple[int, ...], int] = {}
    return [
        seen.setdefault(tuple(tokens[:length]), number)
        for number, (tokens, length) in enumerate(zip(batch["tokens"].tolist(), batch["lengths"].tolist(), strict=True))
    ]


def prepare(model: LanguageModel | OffloadedModel | None) -> None:
    if isinstance(model, OffloadedModel):
        model.prefetch()


def at_work(model: LanguageModel | OffloadedModel):
    """A context in which the model's weights are on the device, and it is as it was before adapters
    learnt."""
    return model if isinstance(model, OffloadedModel) else lora.without(model)


def rewards_of(config: PPOConfig, rollout: Rollout, scored: Scored, kl_coef: float, reward_bias: float) -> torch.Tensor:
    """(B, T) the KL penalty at each response token, and the final score at the last one."""
    scores = final_scores(config, rollout, scored, reward_bias)
    # kl_coef is 0 then
    reference = scored.logprobs if scored.ref_logprobs is None else scored.ref_logprobs
    return losses.token_rewards(scored.logprobs, reference, scores, rollout.batch["response_mask"], kl_coef)


def measured_value_bias(
    config: PPOConfig, rollout: Rollout, scored: Scored, kl_coef: float, reward_bias: float
) -> float:
    """What makes the value head's mean that of the rewards still to come, over all response tokens
    of the first iteration.

    The value model starts from the reward model, whose zero is arbitrary and whose head was trained
    at replies' ends only: what it says before them is off by a constant that neither the reward
    model's bias nor its scores tell. Whitening takes only the mean of the advantages away, and
    ``value_clip`` lets values follow slowly, so a wrong zero pays for ending early or for going on.
    """
    mask = rollout.batch["response_mask"]
    rewards = rewards_of(config, rollout, scored, kl_coef, reward_bias)
    to_come, _ = losses.gae(rewards, torch.zeros_like(rewards), mask, config.gamma, lam=1.0)
    return float(moments(to_come - scored.values, mask)[0])


def experience(
    config: PPOConfig, rollout: Rollout, scored: Scored, kl_coef: float, reward_bias: float, value_bias: float
) -> Experience:
    """Per-token rewards, advantages whitened over all response tokens of the iteration, returns,
    and the report.

    "value_offset" is the mean of return - value, "value_offset_last" that at the last token, where
    the return is the reward alone.
    """
    mask, values = rollout.batch["response_mask"], scored.values + value_bias
    rewards = rewards_of(config, rollout, scored, kl_coef, reward_bias)
    advantages, returns = losses.gae(rewards, values, mask, config.gamma, config.lam)
    mean, variance = moments(advantages, mask)
    _, returns_variance = moments(returns, mask)
    offset, residual_variance = moments(returns - values, mask)
    batch = {
        **sampled(config, rollout, scored),
        "old_values": values,
        "returns": returns,
        "advantages": losses.whiten(advantages, mean, variance, mask),
    }
    metrics = {
        **report(rollout, scored, config, reward_bias),
        "value_offset": float(offset),
        "value_offset_last": float((returns - values).gather(1, losses.last_token(mask)).mean()),
        "explained_variance": 1 - float(residual_variance / returns_variance.clamp(min=1e-8)),
    }
    return Experience(batch, metrics)


def sampled(config: RolloutConfig, rollout: Rollout, scored: Scored) -> Batch:
    """The rollout's batch with what the policy's loss needs to know of how it was drawn:
    "old_logprobs" and, where there is a cap, "importance_weights" (B, T)."""
    batch = {**rollout.batch, "old_logprobs": scored.logprobs}
    if config.importance_cap:
        batch["importance_weights"] = losses.importance_weights(
            scored.logprobs, rollout.behaviour_logprobs, config.importance_cap
        )
    return batch


def moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance (divided by the count) of ``values`` where ``mask``, computed in double
    precision."""
    chosen = values.double()[mask]
    return chosen.mean().float(), chosen.var(correction=0).float()


def final_scores(config: RolloutConfig, rollout: Rollout, scored: Scored, reward_bias: float) -> torch.Tensor:
    """(B,) the reward model's scores with bias and clip; ``missing_eos_penalty`` where the response
    has no EOS."""
    scores = (scored.scores + reward_bias).clamp(-config.reward_clip, config.reward_clip)
    return torch.where(rollout.ended, scores, config.missing_eos_penalty)


def report(rollout: Rollout, scored: Scored, config: RolloutConfig, reward_bias: float) -> dict[str, float]:
    """Means over samples: reward, KL to the reference, if any, per response in nats (k1 and k3),
    EOS rate, length, repetition; how reward and length go together (Pearson's correlation, 0 where
    one of them is constant); and how far the rollout's log-probabilities are from the training
    forward's: mean and largest |difference| in nats, and the mean over tokens of its exp (NeMo-RL's
    token_mult_prob_error)."""
    mask, scores = rollout.batch["response_mask"], final_scores(config, rollout, scored, reward_bias).double()
    lengths = mask.sum(1).double()
    responses = [row[inside].tolist() for row, inside in zip(rollout.batch["tokens"], mask, strict=True)]
    spread = scores.std(correction=0) * lengths.std(correction=0)
    apart = (scored.logprobs - rollout.behaviour_logprobs).abs().double()[mask]
    together = ((scores - scores.mean()) * (lengths - lengths.mean())).mean()
    kl = (
        {}
        if scored.ref_logprobs is None
        else {
            name: (estimator(scored.logprobs, scored.ref_logprobs) * mask).sum(1).double().mean().item()
            for name, estimator in (("kl", losses.kl_k1), ("kl_k3", losses.kl_k3))
        }
    )
    return {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        **kl,
        "eos_rate": rollout.ended.double().mean().item(),
        "response_length": lengths.mean().item(),
        "repeated_ngrams": sum(map(repeated_ngrams, responses)) / len(responses),
        "reward_length_correlation": (together / spread).item() if spread > 1e-9 else 0.0,
        "logprob_error": apart.mean().item(),
        "logprob_error_max": apart.max().item(),
        "token_mult_prob_error": apart.exp().mean().item(),
    }


def repeated_ngrams(tokens: list[int], n: int = 3) -> float:
    """Share of a response's n-grams that stood there before, 0..1."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
