"""Start as we are tested: megatron-core's import without torch's compiler on machines without CUDA,
and no ``python -O``. Standard library only.

megatron-core decorates its fusions with ``torch.compile`` while it is imported, which loads dynamo
and inductor: 3.4 of the 7.9 s that a process of a stage needs to start on two cores, for functions
that are never called there. Its own switch, ``megatron.core.jit.disable_jit_fuser``, has to be
thrown after that module is loaded and before the next one is.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder

MODULE = "megatron.core.jit"
PROGRAMS = ("launcher", "training", "conversion")


class _Switch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_switch(module) -> None:
            load(module)
            import torch

            if not torch.cuda.is_available():
                module.disable_jit_fuser()

        spec.loader.exec_module = load_and_switch
        return spec


def without_compiler() -> None:
    """Call before the first import of megatron-core; harmless afterwards."""
    if MODULE not in sys.modules and not any(isinstance(finder, _Switch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Switch())


def without_optimization() -> None:
    """Under ``python -O`` or ``-OO`` (PYTHONOPTIMIZE=1 or 2) replace one of our programs by the
    same one without it.

    transformers needs its docstrings, so do our ``--help`` texts, and megatron-core's asserts guard
    a run. eval has this too.
    """
    command = sys.orig_argv
    is_own = (
        (*command, "")[command.index("-m") + 1].split(".")[0] in PROGRAMS
        if "-m" in command
        else sys.argv[0].endswith("/convoy")
    )
    without_flag = [word for word in command if word not in ("-O", "-OO")]
    if sys.flags.optimize and is_own and (len(without_flag) < len(command) or "PYTHONOPTIMIZE" in os.environ):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
        os.execve(sys.executable, [sys.executable, *without_flag[1:]], environment)
