"""Replies of Hugging Face models to questions and held-out prompts. It knows no judge."""
