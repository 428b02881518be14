"""Optimizers and schedules, and what waits in host memory. It knows no loss."""
