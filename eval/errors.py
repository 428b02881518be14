"""The evaluation's kinds of trouble, each with its exit code."""


class DataError(ValueError):
    """Input that can't be used: the message names file, line, value, what was expected and the fix.
    Exit code 65."""


class JudgeError(RuntimeError):
    """The judge can't be used: the message names address, cause and fix, and never holds the
    key."""


class HarnessError(RuntimeError):
    """lm-evaluation-harness failed: the message holds its last words and where the rest is."""


class SurroundingsError(ValueError):
    """RANK, WORLD_SIZE and their like in the environment fit no start of several ranks. Exit code
    64."""


class Busy(RuntimeError):
    """Another start is at work on the same files: the message names the folder. Exit code 75."""


class InvariantError(AssertionError):
    """What always holds does not: a bug. Unlike ``assert`` it also guards an evaluation under
    ``python -O``."""
