"""Qwen 3 (dense): Llama's modules, and a norm on each head's query and key."""
