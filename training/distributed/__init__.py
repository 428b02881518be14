"""Ranks: how they meet, which groups they form, how they agree and stop. It knows no model."""
