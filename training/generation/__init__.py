"""The rollout engine: requests in, completions out. It knows no reward and no trainer."""
