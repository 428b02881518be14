"""What a process of a stage loads before its first step, and what it need not compile again."""

import os
import re
import subprocess
import sys

import pytest
import torch

from launcher.job.supervise import Supervisor
from launcher.run.folder import Run


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the fusions are compiled")
@pytest.mark.parametrize("module", ["training.ppo", "conversion.hf_to_megatron"])
def test_without_cuda_no_process_loads_the_compiler(module):
    code = f"import sys, {module}; print([name for name in sys.modules if name.startswith(('megatron.core.jit', 'torch._ind'))])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "megatron.core.jit" in loaded and "compile_fx" not in loaded


def test_a_second_process_of_a_run_finds_the_graphs_of_the_first_and_the_log_says_so(tmp_path, monkeypatch):
    """In the folders that the launcher gives it. A product alone: no C++ is compiled for it."""
    # torch sets them where something was compiled before
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    supervisor = Supervisor.__new__(Supervisor)
    supervisor.run = Run(tmp_path)
    code = (
        "import torch; from training.metrics import startup_timer as clock; clock.mark('imports'); assert not "
        "clock.compiling(); torch.compile(torch.mm)(torch.ones(4, 4), torch.ones(4, 4)); clock.mark('first "
        "iteration'); print(clock.report())"
    )
    for found in (0, 1):
        said = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **supervisor.compile_caches()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        line = r"start: imports [\d.]+ s, first iteration [\d.]+ s \(compiling [\d.]+ s of it, %d of 1 graphs kept from before\); together"
        assert re.match(line % found, said), said
    assert list((tmp_path / "compiled/inductor/fxgraph").rglob("*"))
