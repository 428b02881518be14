"""Health gates: updates that are not made, and numbers that may not stay bad for long. Pure
bookkeeping; every rank decides alike.

* An update whose loss or gradient is not finite, or whose gradient's norm is ``grad_spike`` times
  its running mean, is left out: weights, optimizer and schedule stay as they were, bit for bit.
  More than ``skip_updates`` in a row end the stage (``Guard``).
* A number of PPO's on the wrong side of its limit is said at once. ``gate_pause`` iterations in a
  row save a checkpoint and end the stage with exit code 76: nothing queues it again, a person
  looks, ``resume`` goes on. ``gate_stop`` in a row (also counted over a pause) end it without
  saving (``Gates``).

What catches which fault (each is injected by tests/training/test_faults.py); the invariants are
training.rl.invariants':

    response mask shifted by one                  the samples' invariant, before anything is scored
    PAD = EOS, or no PAD                          harmless: lengths make the masks, and an exported
                                                  classifier gets a PAD
    another temperature in the rollout            first update: the samples' surprisal is not the
                                                  policy's entropy
    another temperature in update or reference    first update: the ratio is not 1; first iteration:
                                                  the KL is not 0
    dropout left on                               first update: the ratio is not 1
    a reference that is not the SFT model         first iteration: the KL is not 0
    a reference that moves with the policy        gate: the KL stays exactly 0
    loss or gradient not finite, or a spike       the update is left out; more than ``skip_updates``
                                                  in a row end the stage
    policy far from the reference, no EOS,        gates: kl_max, eos_rate_min,
    length bought as reward, useless values,      length_correlation_max, explained_variance_min,
    values with another zero, collapsed entropy   value_offset_max, entropy_min
    rollouts drawn from another policy, later on  mult_prob_error_max
"""

from __future__ import annotations

from typing import NamedTuple

from training.config.trainers import RolloutConfig
from training.errors import Unhealthy


class Gate(NamedTuple):
    """One number of an iteration and its limit, a key of RolloutConfig or PPOConfig; ``highest``:
    it is the most allowed, not the least."""

    metric: str
    key: str
    highest: bool
    text: str
    magnitude: bool = False
    """The limit is that of the number without its sign."""


GATES = (
    Gate("kl", "kl_max", True, "KL to the reference, nats per response"),
    Gate("eos_rate", "eos_rate_min", False, "share of responses that end"),
    Gate("explained_variance", "explained_variance_min", False, "explained variance of the values"),
    Gate("value_offset", "value_offset_max", True, "|mean of return - value|", magnitude=True),
    Gate("reward_length_correlation", "length_correlation_max", True, "correlation of reward and length"),
    Gate("entropy", "entropy_min", False, "entropy, nats per token"),
    Gate(
        "token_mult_prob_error",
        "mult_prob_error_max",
        True,
        "rollout against training, mean of exp |log p - log p_rollout|",
    ),
)
STILL = "reference"
"""The gate without a limit: the KL to the reference is exactly 0 although the policy learns."""


class Gates:
    """Counts for each gate the iterations in a row in which it is breached."""

    def __init__(self, config: RolloutConfig):
        self.config = config
        self.breaches = {STILL: 0} | {gate.key: 0 for gate in GATES}

    def judge(self, iteration: int, metrics: dict[str, float]) -> tuple[list[str], str]:
        """(warnings, why to pause or "") after an iteration. Raises Unhealthy when it is time to
        stop.

        A metric that is absent (values of GRPO, KL without a reference) is not judged; NaN
        breaches.
        """
        config = self.config
        if iteration <= config.gate_after + config.value_warmup:
            return [], ""
        # until then the policy has not moved
        still = metrics.get("kl_k3") == 0 and iteration > config.value_warmup + 1
        bad = {STILL: "the KL to the reference is exactly 0: it seems to move with the policy"} if still else {}
        for gate in GATES:
            if (value := metrics.get(gate.metric)) is None:
                continue
            limit, value = getattr(config, gate.key), abs(value) if gate.magnitude else value
            if not (value <= limit if gate.highest else value >= limit):
                bad[gate.key] = f"{gate.text} = {value:.4g}, {gate.key} = {limit:g}"
        self.breaches = {key: count + 1 if key in bad else 0 for key, count in self.breaches.items()}
        breaches = {key: f"{text}, {self.breaches[key]} iterations in a row" for key, text in bad.items()}
        for key, text in breaches.items():
            if config.gate_stop and self.breaches[key] >= config.gate_stop:
                raise Unhealthy(f"stopped by a health gate at iteration {iteration}: {text}; not saved")
        pausing = [text for key, text in breaches.items() if self.breaches[key] == config.gate_pause]
        return list(breaches.values()), "; ".join(pausing)

    def state_dict(self) -> dict[str, int]:
        return self.breaches

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.breaches |= state  # an earlier version had fewer gates
