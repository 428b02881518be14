"""The kinds of trouble that end a stage. Each becomes an exit code in training/main.py.

Standard library only: the launcher raises some of them, too.
"""

from __future__ import annotations

from collections.abc import Callable


class ConfigError(ValueError):
    """A user's mistake: the message names the key, its value, what was expected and the fix.
    ``messages``: each of several."""

    @property
    def messages(self) -> list[str]:
        return list(self.args) if len(self.args) > 1 else [str(self)]

    def __str__(self) -> str:
        if len(self.args) < 2:
            return super().__str__()
        return f"{len(self.args)} mistakes:\n" + "\n".join(f"{at}. {text}" for at, text in enumerate(self.args, 1))


class Mistakes:
    """Collects ConfigErrors, so that a person sees all of them at once."""

    def __init__(self):
        self.messages: list[str] = []

    def add(self, *messages: str) -> None:
        self.messages += [text for text in messages if text not in self.messages]

    def of(self, check: Callable, *arguments):
        """What ``check(*arguments)`` returns, None where it raised."""
        try:
            return check(*arguments)
        except ConfigError as error:
            self.add(*error.messages)
            return None

    def raise_if_any(self) -> None:
        if self.messages:
            raise ConfigError(*self.messages)


class InvariantError(AssertionError):
    """What always holds does not: a bug. Unlike ``assert`` it also guards a run under ``python
    -O``."""


class DataError(ValueError):
    """Training data that can't be used; the message names the file, the line and the field."""

    exit_code = 65


class Damaged(ValueError):  # noqa: N818 - what is wrong with the checkpoint
    """A checkpoint that must not be used; the message names the file and what to do, ``what`` only
    the first."""

    def __init__(self, what: str, fix: str = ""):
        super().__init__(f"{what}. {fix}" if fix else what)
        self.what = what


class CollectiveError(RuntimeError):
    """Base of errors that all ranks raise together, outside any collective, so that the groups can
    be destroyed cleanly."""


class NoRoom(CollectiveError):
    """The rollout engine's cache does not fit now. Another process, whose memory is whole, may have
    room."""


class Unhealthy(CollectiveError):
    """A health gate ends the stage; the message names gate, value, limit, and whether the iteration
    is saved."""


class Interrupted(CollectiveError):
    """A signal asked the stage to stop; everything is saved."""
