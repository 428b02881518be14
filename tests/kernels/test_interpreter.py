"""All tests of this folder in Triton's interpreter, where there is no GPU.

It is chosen when Triton is imported, for a whole process: so this is one of its own, and no other
test sees it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install -e '.[test]')"
)
@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="they run in this process"
)
def test_the_kernels_in_triton_s_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        str(FOLDER),
    ]
    process = subprocess.run(
        command, cwd=FOLDER.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, text=True, capture_output=True
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    assert "passed" in process.stdout.splitlines()[-1]
