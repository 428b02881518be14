"""Evaluation: answers, judge, scores, report."""

import os
import sys


def without_optimization() -> None:
    """Under ``python -O`` or ``-OO`` (PYTHONOPTIMIZE=1 or 2) replace a program of this package by
    the same one without it: transformers can't be loaded without its docstrings. As
    training.distributed.lazy_inductor does."""
    words = sys.orig_argv
    ours = "-m" in words and (*words, "")[words.index("-m") + 1].split(".")[0] == "eval"
    kept = [word for word in words if word not in ("-O", "-OO")]
    if sys.flags.optimize and ours and (len(kept) < len(words) or "PYTHONOPTIMIZE" in os.environ):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONOPTIMIZE"}
        os.execve(sys.executable, [sys.executable, *kept[1:]], environment)


without_optimization()
