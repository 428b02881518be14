"""Checkpoints: their format, how they are written, checked and read. It knows no trainer's loop."""
