"""Shared fixtures. One thread a rank: the machine may have two cores, and sums then have one order."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
