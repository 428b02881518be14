"""What PPO and GRPO share: experience, minibatches, gates and invariants."""
