"""What a stage's config.json and a model's config.json mean. The launcher reads it, too: standard
library only."""
