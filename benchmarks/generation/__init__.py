"""How fast the rollout engine generates, and whether its tokens and log-probabilities are right."""
