"""What holds exactly when a run begins, whatever the model and the data: checked at run time, since
a violation is a bug and no luck.

Each raises InvariantError, on every rank alike, with the values and what they mean.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from training.config.trainers import RolloutConfig
from training.errors import InvariantError
from training.trainer.step import Batch

TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}
"""Largest KL, nats per token, where 0 is expected: kernels may round the bf16 layers of a training
pass otherwise than those of a scoring pass. Logits are fp32 in both."""
SIGMAS, NATS = 6.0, 0.05
"""How far surprisal and entropy may be apart: standard errors, and nats beside a tenth of the
entropy (nearly certain tokens)."""
FEW = 100
"""Tokens below which the standard error is itself a guess: 8 tokens of a peaked distribution are 6
of theirs away one time in ten."""


def samples_are_whole(batch: Batch, starts: list[int], ended: torch.Tensor, stop_ids: Collection[int]) -> None:
    """The response mask covers each response from its first id to its last. One of ``stop_ids`` is
    that last one where the response ended, and stands nowhere else in it."""
    tokens, mask, lengths = batch["tokens"], batch["response_mask"], batch["lengths"]
    position = torch.arange(tokens.size(1))
    expected = (position >= torch.tensor(starts)[:, None]) & (position < lengths[:, None])
    for row in (mask != expected).any(1).nonzero().flatten().tolist():
        inside = mask[row].nonzero().flatten().tolist()
        raise InvariantError(
            f"sample {row}: the response is tokens {starts[row]} to {int(lengths[row]) - 1}, but "
            f"response_mask is True {f'from {inside[0]} to {inside[-1]}' if inside else 'nowhere'}"
        )
    stops = torch.isin(tokens, torch.tensor(sorted(stop_ids), dtype=tokens.dtype))
    last = stops.gather(1, lengths[:, None] - 1).squeeze(1)
    wrong = (last != ended) | ((stops & mask).sum(1) != ended)
    if wrong.any():
        raise InvariantError(
            f"sample {int(wrong.nonzero()[0])}: a stop id (of {sorted(stop_ids)}) stands elsewhere than at the end of "
            "the response"
        )


def policy_is_reference(config: RolloutConfig, metrics: dict[str, float]) -> None:
    """Before the first update policy and reference are the same weights: k3 is 0 at every token."""
    # NaN is refused, too
    if not metrics["kl_k3"] <= TOLERANCE[config.precision] * metrics["response_length"]:
        raise InvariantError(
            f"iteration 1: KL to the reference = {metrics['kl_k3']:.4g} nats per response (k3), expected 0: policy and "
            "reference are both the SFT model (other weights, temperature, dropout or rows in one of the two passes?)"
        )


def first_update(config: RolloutConfig, step: dict[str, float], batch: Batch) -> None:
    """An iteration's first minibatch learns from the policy that made it. The ratio is 1, so approx
    KL and clip fraction are 0, and the loss is -mean(A), A times its importance weight where there
    is one. Its tokens are samples of that policy: the mean of -log p(token) is its entropy to
    within the standard error."""
    if step["skipped_updates"]:
        return
    mask = batch["response_mask"][: config.global_batch_size]
    weighted = batch["advantages"] * batch.get("importance_weights", 1.0)
    advantage = weighted[: config.global_batch_size][mask].double().mean().item()
    small = TOLERANCE[config.precision]
    same = (
        step["approx_kl"] <= small
        and step["clip_fraction"] <= 5 * small
        and abs(step["policy_loss"] + advantage) <= 10 * small
    )
    if not same:  # NaN is not the same, either
        raise InvariantError(
            f"first minibatch: approx KL {step['approx_kl']:.4g}, clip fraction {step['clip_fraction']:.4g}, policy "
            f"loss {step['policy_loss']:.6g}; expected 0, 0 and {-advantage:.6g}: the policy that learns is not the "
            "one whose log-probabilities were kept (temperature, dropout, mask or rows differ between the "
            "scoring pass and the update?)"
        )
    surprisal = -batch["old_logprobs"][: config.global_batch_size][mask].double()
    apart, error = surprisal.mean().item() - step["entropy"], surprisal.std().item() / len(surprisal) ** 0.5
    if not (len(surprisal) < FEW or abs(apart) <= max(SIGMAS * error, NATS + 0.1 * step["entropy"])):
        raise InvariantError(
            f"the samples' mean -log p = {surprisal.mean():.4g} nats a token, but the policy's entropy there is "
            f"{step['entropy']:.4g} (standard error {error:.2g}): they were not drawn from this policy (another "
            "temperature, mask or cache in the rollout?)"
        )
