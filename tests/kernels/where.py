"""Where Triton's kernels run: compiled on a GPU, or in Triton's interpreter (see
test_interpreter.py). Import this before a kernel."""

import importlib.util
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed (pip install -e '.[test]')", allow_module_level=True)
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("no GPU: tests/kernels/test_interpreter.py runs them in Triton's interpreter", allow_module_level=True)
