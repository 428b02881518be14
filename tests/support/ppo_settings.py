"""Settings of a small PPO stage."""

from training.config.trainers import PPOConfig, PPOPaths


def settings(**values) -> PPOConfig:
    # a step that moves nothing
    small = dict(
        precision="fp32",
        iterations=2,
        micro_batch_size=1,
        global_batch_size=8,
        rollout_batch_size=16,
        warmup_iterations=0,
        prompt_length=32,
        response_length=16,
        lr=1e-30,
        value_lr=1e-30,
    )
    return PPOConfig(paths=PPOPaths("", "", "", "", "", ""), **(small | values))
