"""What a process of a stage loads before its first step."""

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the fusions are compiled")
@pytest.mark.parametrize("module", ["training.ppo", "conversion.hf_to_megatron"])
def test_without_cuda_no_process_loads_the_compiler(module):
    code = f"import sys, {module}; print([name for name in sys.modules if name.startswith(('megatron.core.jit', 'torch._ind'))])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "megatron.core.jit" in loaded and "compile_fx" not in loaded
