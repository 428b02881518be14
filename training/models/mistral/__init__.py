"""Mistral: Llama's modules under names of its own."""
