"""Qwen 2 and 2.5: Llama's modules, and biases on query, key and value."""
