"""PPO with a KL penalty (Ziegler et al. 2019; Ouyang et al. 2022): ``python -m training.ppo
config.json``.

An iteration: sample responses; log-probabilities of policy and frozen reference, values and rewards
by the training forward; rewards per token, GAE, whitening over the whole iteration; clipped updates
of policy and value, one denominator a minibatch. Optional: an entropy bonus, dual clip, an adaptive
KL coefficient. Left out: off-policy reuse of samples, top-p and top-k. Every draw is seeded by
(seed, iteration, row), so in fp32 samples depend neither on layout nor on interruptions. In bf16
the same draw may give another token where rounding decides (training.generation.engine).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from functools import partial

import torch

from training import losses
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import PPOConfig, RolloutConfig
from training.data.batches import Sampler, prompt_tokens
from training.distributed import groups
from training.errors import ConfigError, NoRoom
from training.generation.engine import EngineLimits
from training.generation.request import draws
from training.generation.rollout_workers import Replicas
from training.main import run_stage
from training.metrics.phase_timer import Phases
from training.models.heads import Output, next_token_logprobs_and_entropy
from training.models.language_model import LanguageModel
from training.optim.offload import OffloadedModel
from training.rl import invariants, reward_bias
from training.rl.experience import (
    Experience,
    Models,
    Rollout,
    Scored,
    experience,
    measured_value_bias,
    report,
    roll_out,
    score,
    state_values,
)
from training.rl.health_gates import Gates
from training.rl.minibatches import Plan, epochs, plan
from training.trainer import sample_text
from training.trainer.loop import Boundary, at, is_finished, resume
from training.trainer.setup import read_inputs
from training.trainer.step import Batch, Learner, Objective, build_model, on_device

HEADLINE = (
    "reward",
    "kl",
    "heldout_reward",
    "heldout_kl",
    "entropy",
    "eos_rate",
    "response_length",
    "clip_fraction",
    "explained_variance",
    "grad_norm",
)
"""Numbers that the log shows; metrics.jsonl has them all."""


def policy_objective(config: RolloutConfig, kl_coef: float = 0.0) -> Objective:
    """``kl_coef``: weight of the KL to the reference (k3) in the loss, where it does not stand in
    the reward."""

    def compute(output: Output, batch: Batch):
        mask = batch["response_mask"]
        logprobs, entropy = next_token_logprobs_and_entropy(output, batch["tokens"], config.temperature, mask)
        surrogate, clipped, approx_kl = losses.policy_loss(
            logprobs,
            batch["old_logprobs"],
            batch["advantages"],
            mask,
            config.clip_ratio,
            config.dual_clip,
            config.clip_ratio_high,
            batch.get("importance_weights"),
        )
        loss = surrogate - config.entropy_coef * entropy.sum() if config.entropy_coef else surrogate
        if kl_coef:
            loss = loss + kl_coef * (losses.kl_k3(logprobs, batch["ref_logprobs"]) * mask).sum()
        return loss, mask.sum(), torch.stack((surrogate.detach(), clipped, approx_kl, entropy.detach().sum()))

    return Objective(("policy_loss", "clip_fraction", "approx_kl", "entropy"), compute)


def value_objective(config: PPOConfig, value_bias: float) -> Objective:
    def compute(outputs: torch.Tensor, batch: Batch):
        mask = batch["response_mask"]
        values = state_values(outputs) + value_bias
        loss = losses.value_loss(values, batch["old_values"], batch["returns"], mask, config.value_clip)
        return loss, mask.sum(), loss[None]

    return Objective(("value_loss",), compute)


def learn(learner: Learner, batch: Batch, passes: list[Plan], objective: Objective) -> list[dict[str, float]]:
    """A step for each minibatch of ``passes`` over the samples -> each step's metrics."""
    batch = on_device(batch)
    return [
        learner.step(rows.micro_batches(batch, number), objective)
        for rows in passes
        for number in range(len(rows.minibatches))
    ]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """The means of an iteration's steps, of those that are finite; the number of skipped
    updates."""
    made = {}
    for name in steps[0]:
        values = [step[name] for step in steps if math.isfinite(step[name])]
        made[name] = (
            sum(values) if name.endswith("skipped_updates") else sum(values) / len(values) if values else math.nan
        )
    return made


def load_models(config: RolloutConfig, shape: Shape) -> Models:
    """Policy and reference from the SFT model; reward and, of PPO, value from the reward model.
    With adapters the reference is the policy; without a KL penalty there is none."""
    sft = StageFolder(config.paths.init).resolve() / "model"
    reward = StageFolder(config.paths.reward).resolve(config.paths.reward_iteration) / "model"

    def make(head: str, source, settings: RolloutConfig) -> LanguageModel:
        model = build_model(shape, settings, head)
        format.load_weights(source, model)
        return model

    def frozen(head: str, source) -> LanguageModel | OffloadedModel:
        # No one asks for its gradients, but its weights say that they want some: else its layers
        # would be compiled apart, with the bias added inside the product, and round otherwise than
        # the policy's. The first KL would not be 0.
        model = make(head, source, dataclasses.replace(config, lora_rank=0))
        return OffloadedModel(model) if config.offload != "none" else model

    policy = make("lm", sft, config)
    reference = (policy if config.lora_rank else frozen("lm", sft)) if config.kl_coef else None
    return Models(
        policy=policy,
        reference=reference,
        reward=frozen("scalar", reward),
        value=make("scalar", reward, config) if isinstance(config, PPOConfig) else None,
    )


class PPO:
    """Everything the loop reads and a checkpoint holds."""

    def __init__(self, config: RolloutConfig):
        self.config = config
        self.shape, self.tokenizer, self.rows, self.unseen = read_inputs(config, "rlhf")
        self.models = load_models(config, self.shape)
        self.learners = self.make_learners()
        self.policy, self.first_learner = self.learners["policy"], self.learners.get("value", self.learners["policy"])
        self.sampler = Sampler(len(self.rows), config.rollout_batch_size // config.group_size, config.seed)
        limits = EngineLimits(
            config.prompt_length + config.response_length, config.generation_batch_size, config.cache_share
        )
        self.replicas = Replicas(
            self.models.policy, self.shape, limits, self.rows.stop_ids, config.generation_tensor_parallel
        )
        self.kl_coef = config.kl_coef
        self.reward_bias = reward_bias.stored(StageFolder(config.paths.reward).resolve(config.paths.reward_iteration))
        self.value_bias: float | None = None
        """Added to the value head's outputs; measured in the first iteration."""
        self.gates, self.proven = Gates(config), False

    def make_learners(self) -> dict[str, Learner]:
        config = self.config
        steps, warmup = config.iterations * config.updates, config.warmup_iterations * config.updates
        self.value = self.learner(self.models.value, config.value_lr, steps, warmup)
        policy = self.learner(self.models.policy, config.lr, steps - config.value_warmup * config.updates, warmup)
        return {"policy": policy, "value": self.value}

    def learner(self, model: LanguageModel, lr: float, steps: int, warmup: int) -> Learner:
        made = Learner(model, self.config, lr, steps, warmup)
        if self.config.offload == "all":
            made.offload()
        return made

    def learn_from(self, rollout: Rollout, scored: Scored) -> Experience:
        if self.value_bias is None:
            self.value_bias = measured_value_bias(self.config, rollout, scored, self.kl_coef, self.reward_bias)
        return experience(self.config, rollout, scored, self.kl_coef, self.reward_bias, self.value_bias)

    def update(self, batch: Batch, passes: list[Plan], learn_policy: bool) -> list[dict[str, float]]:
        """Each step's metrics. First all of the value model's: neither model's steps depend on the
        other's, and one is awake at a time."""
        config = self.config
        made = learn(self.value, batch, passes, value_objective(config, self.value_bias))
        made = [
            {name if name == "value_loss" else f"value_{name}": number for name, number in step.items()}
            for step in made
        ]
        self.value.sleep(self.policy if learn_policy else None)
        if learn_policy:
            steps = learn(self.policy, batch, passes, policy_objective(config))
            made = [critic | actor for critic, actor in zip(made, steps, strict=True)]
        self.policy.sleep()
        return made

    def state(self) -> dict:
        return {
            "sampler": self.sampler.state_dict(),
            "kl_coef": self.kl_coef,
            "gates": self.gates.state_dict(),
            "value_bias": self.value_bias,
        }

    def restore(self, state: dict) -> None:
        self.sampler.load_state_dict(state["sampler"])
        self.gates.load_state_dict(state["gates"])
        # an earlier version's value model learnt without one
        self.value_bias = state.get("value_bias", 0.0)
        # else it is the configuration's, which may have been changed for the resume
        if self.config.kl_target:
            self.kl_coef = state["kl_coef"]

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration, from 1 -> its metrics, the same on every rank."""
        config, phases, learn_policy = self.config, Phases(), iteration > self.config.value_warmup
        with phases("generate"):
            prompts = [index for index in self.sampler.next_batch() for _ in range(config.group_size)]
            rollout = self.sample(prompts, self.rows, iteration)
        engine_metrics = self.replicas.report
        passes = epochs(config, self.shape, rollout.batch["lengths"].tolist(), iteration)
        rows = passes[0]
        with phases("score"):
            self.first_learner.wake()
            scored = score(config, self.models, rollout.batch, rows)
        samples = self.learn_from(rollout, scored)
        if iteration == 1 and self.models.reference:
            invariants.policy_is_reference(config, samples.metrics)
        with phases("update"):
            steps = self.update(samples.batch, passes, learn_policy)
        if learn_policy and not self.proven:
            invariants.first_update(config, steps[0], samples.batch)
            self.proven = True
        metrics = {**samples.metrics, **summary(steps), "kl_coef": self.kl_coef, "packing_efficiency": rows.efficiency}
        # before, the policy has not moved and its KL says nothing
        if config.kl_target and learn_policy:
            self.kl_coef = losses.adaptive_kl_coef(
                self.kl_coef, metrics["kl"], config.kl_target, config.rollout_batch_size, config.kl_horizon
            )
        seen, new = sum(rows.lengths), int(rollout.batch["response_mask"].sum())
        return {
            **metrics,
            **engine_metrics,
            "tokens_per_second": new / sum(phases.seconds.values()),
            **phases.metrics({"generate": new, "score": seen, "update": seen * config.epochs}),
        }

    def heldout(self, iteration: int) -> dict[str, float]:
        """Reward and, with a reference, KL to it (nats per response) on the held-out prompts, with
        the same draws at every call. A collective."""
        rollout = self.sample(list(range(len(self.unseen))), self.unseen, 0)
        rows = plan(self.config, self.shape, rollout.batch["lengths"].tolist(), len(self.unseen))
        if self.config.keep_replies and groups.is_main():
            sample_text.keep(self.config.paths.output, iteration, rollout.batch, self.tokenizer, self.rows.stop_ids)
        models = dataclasses.replace(self.models, value=None)  # no one reads values here
        metrics = report(rollout, score(self.config, models, rollout.batch, rows), self.config, self.reward_bias)
        return {f"heldout_{name}": metrics[name] for name in ("reward", "kl", "kl_k3", "eos_rate") if name in metrics}

    def sample(self, indices: list[int], rows, iteration: int) -> Rollout:
        """Responses to the prompts ``rows[indices]`` with ``iteration``'s draws."""
        config = self.config
        prompts = [prompt_tokens(rows[index], config.prompt_length) for index in indices]
        uniforms = draws(config.seed, iteration, len(prompts), config.response_length)
        return roll_out(config, self.replicas, prompts, uniforms, self.tokenizer)


def run(config: RolloutConfig, trainer: type[PPO] = PPO) -> None:
    """The stage, inside ``ranks``. Raises Interrupted after a signal, all saved."""
    signals = groups.StopRequest()
    ppo = trainer(config)
    folder = StageFolder(config.paths.output)
    start, state = resume(folder, ppo.learners)
    if state:
        ppo.restore(state)
    if is_finished(config, folder, start):
        return
    boundary = Boundary(config, ppo.learners, folder, (start, state), HEADLINE, signals)
    for iteration in range(start + 1, config.iterations + 1):
        with at(iteration):
            try:
                values = ppo.iterate(iteration)
            except NoRoom as error:
                if iteration > start + 1:
                    raise  # a new process goes on from what is saved
                raise ConfigError(f"{error} (set generation_batch_size, response_length or offload)") from None
        warnings, pause = ppo.gates.judge(iteration, values)
        for warning in warnings if groups.is_main() else ():
            print(f"warning: iteration {iteration}: {warning}", flush=True)
        boundary.end(
            iteration, values | {"gates_breached": len(warnings)}, partial(ppo.heldout, iteration), ppo.state, pause
        )


if __name__ == "__main__":
    sys.exit(run_stage(PPOConfig, run))
