"""From a user's file to batches. It knows no model beyond its tokenizer, and no trainer."""
