"""Group relative policy optimisation (Shao et al. 2024): ``python -m training.grpo config.json``.

PPO without a value model: each prompt gets ``group_size`` samples, and what a sample scored beyond
its group's mean is the advantage of each of its tokens. The KL penalty to the SFT model stands in
the loss (k3) or, with ``kl_in = "reward"``, in the score. Unlike the paper's, the loss is one mean
over all tokens of a minibatch: in a mean of the samples' means the tokens of long samples count
less (Yu et al. 2025, section 3.3). Left out: process rewards, and a new reward model or reference
on the way.
"""

from __future__ import annotations

import sys

from training import losses, ppo
from training.config.trainers import GRPOConfig
from training.main import run_stage
from training.rl.experience import Experience, Rollout, Scored, final_scores, report, sampled
from training.rl.minibatches import Plan
from training.trainer.step import Batch, Learner


class GRPO(ppo.PPO):
    """What differs from PPO."""

    def make_learners(self) -> dict[str, Learner]:
        config = self.config
        steps, warmup = config.iterations * config.updates, config.warmup_iterations * config.updates
        return {"policy": self.learner(self.models.policy, config.lr, steps, warmup)}

    def learn_from(self, rollout: Rollout, scored: Scored) -> Experience:
        return experience(self.config, rollout, scored, self.kl_coef, self.reward_bias)

    def update(self, batch: Batch, passes: list[Plan], learn_policy: bool) -> list[dict[str, float]]:
        objective = ppo.policy_objective(self.config, self.kl_coef if self.config.kl_in == "loss" else 0.0)
        made = ppo.learn(self.policy, batch, passes, objective)
        self.policy.sleep()
        return made


def experience(config: GRPOConfig, rollout: Rollout, scored: Scored, kl_coef: float, reward_bias: float) -> Experience:
    """Advantages (B, T), the same at each token of a sample, and the report with "group_std", the
    scores' mean standard deviation within a group, and "groups_alike", the share of groups whose
    samples all score the same: these teach nothing."""
    mask, scores = rollout.batch["response_mask"], final_scores(config, rollout, scored, reward_bias)
    if config.kl_in == "reward" and scored.ref_logprobs is not None:
        scores = scores - kl_coef * (losses.kl_k1(scored.logprobs, scored.ref_logprobs) * mask).sum(1)
    advantages = losses.group_advantages(scores, config.group_size, config.scale_advantages)[:, None] * mask
    batch = {**sampled(config, rollout, scored), "advantages": advantages}
    if scored.ref_logprobs is not None:
        batch["ref_logprobs"] = scored.ref_logprobs
    groups = scores.view(-1, config.group_size)
    alike = (groups == groups[:, :1]).all(1).double().mean().item()
    metrics = report(rollout, scored, config, reward_bias)
    return Experience(batch, {**metrics, "group_std": groups.std(1).mean().item(), "groups_alike": alike})


def run(config: GRPOConfig) -> None:
    """The stage, inside ``ranks``."""
    ppo.run(config, GRPO)


if __name__ == "__main__":
    sys.exit(run_stage(GRPOConfig, run))
