"""The settings of benchmarks/learning/learns_smollm2.py: what all branches share, what each branch
changes, and the tiny sizes for a CPU."""

from __future__ import annotations

from benchmarks.learning.launch import for_stages, one_gpu_each
from training.config.data import ModelConfig

HELDOUT, HELDOUT_MAX = 0.225, 512
TRAINERS = ("sft", "reward", "rlhf", "grpo", "dpo")
PIPELINES = {"ppo": ("sft", "reward", "rlhf"), "grpo": ("sft", "reward", "grpo"), "dpo": ("sft", "dpo")}
# At 1e-5 a PPO step moves little (clip fraction at most .013, approximate KL .002) and 40
# iterations come to rest: reward and KL of three seeds at coefficient .05 stood still from
# iteration 37 to 65. So 60 show what a coefficient weighs up, not how far a run has come.
ROLLOUTS = {
    "prompt_length": 512,
    "response_length": 96,
    "rollout_batch_size": 256,
    "global_batch_size": 64,
    "micro_batch_tokens": 16384,
    "iterations": 60,
    "lr": 1e-5,
    "schedule": "constant",
    "warmup_iterations": 2,
    "eval_every": 6,
    "log_every": 3,
    "save_every": 60,
    "cache_share": 0.3,
    "keep_replies": True,
}
# On the path of that run the reward rose by .35 a nat at KL 1, .15 at 3, .09 at 5 and .05 at 8,
# where its coefficient held it. Where the slope is the coefficient the policy rests: .2 should stop
# near 1.5 nats, .5 below 1, before replies collapse.
KL_LOW, KL_MIDDLE, KL_HIGH = 0.05, 0.2, 0.5
# GRPO divides scores by a group's standard deviation s and adds kl_coef x KL to the loss: with the
# reward unscaled that is a coefficient of kl_coef x s. At the start s is about .5 (.64 over all
# prompts), so twice PPO's.
KL_GRPO = 2 * KL_MIDDLE
SETTINGS = {
    # So short a run is not worth compiling, a minute a stage, nor checkpoints of 18 bytes a
    # parameter.
    **for_stages(TRAINERS, attention="sdpa", compile=False, optimizer_precision="bf16"),
    **one_gpu_each(TRAINERS),
    "sft.micro_batch_size": 16,
    "sft.iterations": 56,
    "sft.lr": 5e-5,
    "sft.warmup_iterations": 5,
    "sft.save_every": 56,
    "sft.eval_every": 7,
    "sft.sample_every": 0,
    "reward.iterations": 56,
    "reward.global_batch_size": 32,
    "reward.lr": 2e-5,
    "reward.save_every": 56,
    "reward.eval_every": 28,
    "reward.calibration_length": 128,
    "reward.calibration_samples": 128,
    **for_stages(("rlhf", "grpo"), **ROLLOUTS),
    "rlhf.value_lr": 1e-4,
    "rlhf.value_warmup": 2,
    "rlhf.kl_coef": KL_MIDDLE,
    "grpo.kl_coef": KL_GRPO,
    "dpo.iterations": 56,
    "dpo.global_batch_size": 32,
    "dpo.lr": 1e-5,
    "dpo.save_every": 56,
    "dpo.eval_every": 14,
}
BRANCHES = {
    "ppo-seed-0": ("ppo", {"rlhf.seed": 0}),
    "ppo-seed-1": ("ppo", {"rlhf.seed": 1}),
    "ppo-seed-2": ("ppo", {"rlhf.seed": 2}),
    "ppo-kl-low": ("ppo", {"rlhf.seed": 0, "rlhf.kl_coef": KL_LOW}),
    "ppo-kl-high": ("ppo", {"rlhf.seed": 0, "rlhf.kl_coef": KL_HIGH}),
    "grpo": ("grpo", {"grpo.seed": 0}),
    "dpo": ("dpo", {"dpo.seed": 0}),
}
"""Name -> pipeline, what differs; ppo-seed-0 is the middle KL coefficient's, too."""
EVALUATION = {"max-new-tokens": 192, "heldout-max-new-tokens": 96, "batch-size": 256, "context-length": 2048}
TEMPLATE, STOP = "\n\nHuman: {question}\n\nAssistant:", "\n\nHuman:"

TINY_SHAPE = ModelConfig(demo_family="llama", demo_layers=2, demo_hidden=32, demo_heads=2, demo_vocab=320)
TINY_ROLLOUTS = {
    "prompt_length": 64,
    "response_length": 8,
    "rollout_batch_size": 16,
    "global_batch_size": 16,
    "micro_batch_tokens": 256,
    "iterations": 2,
    "warmup_iterations": 0,
    "eval_every": 1,
    "save_every": 2,
}
TINY = {
    **for_stages(TRAINERS, precision="fp32", optimizer_precision="fp32"),
    **for_stages(("sft", "reward", "dpo"), seq_length=128, iterations=2, warmup_iterations=0, save_every=2),
    **for_stages(("rlhf", "grpo"), **TINY_ROLLOUTS),
    "rlhf.value_warmup": 0,
    "reward.calibration_samples": 8,
    "reward.calibration_length": 8,
}
TINY_EVALUATION = {"max-new-tokens": 4, "heldout-max-new-tokens": 8, "batch-size": 32, "context-length": 128}
