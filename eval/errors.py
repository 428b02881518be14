"""The evaluation's two kinds of trouble: input that can't be used (exit code 65) and a judge that can't (exit code 1)."""


class DataError(ValueError):
    """Input that can't be used: the message names file, line, value, what was expected and the fix. Exit code 65."""


class JudgeError(RuntimeError):
    """The judge can't be used: the message names address, cause and fix, and never holds the key."""


class HarnessError(RuntimeError):
    """lm-evaluation-harness failed: the message holds its last words and where the rest is."""
