"""BLOOM: its table of tensors, its modules, its part of the rollout engine."""
