"""Judges: prompts, requests, budget, replies. It computes no score."""
