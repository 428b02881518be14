"""Evaluation: answers, judge, scores, report."""

import os
import sys


def without_optimization() -> None:
    """Under ``python -O`` or ``-OO`` (PYTHONOPTIMIZE=1 or 2) replace a program of this package by
    the same one without it: transformers can't be loaded without its docstrings. As
    training.distributed.lazy_inductor does."""
    command = sys.orig_argv
    is_own = "-m" in command and (*command, "")[command.index("-m") + 1].split(".")[0] == "eval"
    without_flag = [word for word in command if word not in ("-O", "-OO")]
    if sys.flags.optimize and is_own and (len(without_flag) < len(command) or "PYTHONOPTIMIZE" in os.environ):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
        os.execve(sys.executable, [sys.executable, *without_flag[1:]], environment)


without_optimization()
