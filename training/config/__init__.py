"""Configuration: a stage's config.json, a model's config.json, and the cost of a micro-batch.

It knows no data and no trainer. Standard library only: the launcher reads it, too.
"""
