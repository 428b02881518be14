"""The key of a hosted judge: from an environment variable or a private file, and taken out of what
is kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

from eval.config import MTBenchConfig
from eval.errors import JudgeError
from eval.files.foreign import plain
from eval.files.private import read_private

_PLACEHOLDER = 8
"""Characters; a shorter key (EMPTY, none) is no secret, and its letters may well stand in a
judgment."""
_LONGEST = 1 << 14
"""Bytes of a file that may hold a key."""


class Key:
    """A key and where it is from; ``text`` is "" for none."""

    def __init__(self, text: str, place: str):
        self.text, self.place = text, place
        self._quoted = re.compile(
            "".join(rf"(?:\\{{0,9}}{re.escape(c)}|(?i:\\{{1,9}}u{ord(c):04x}|%{ord(c):02x}))" for c in text)
        )

    def redacted(self, text: str) -> str:
        """Endpoints quote the key in their messages: as it is, or with JSON's, Python's or an
        address's escapes."""
        return self._quoted.sub("***", text) if self.text else text

    def shown(self, text: str) -> str:
        """Text of the endpoint as it may be printed: without the key, and without what would steer
        a terminal."""
        return plain(self.redacted(text))

    def clean(self, text: str) -> str:
        """A reply as it may be kept: without the key, and with U+FFFD for half a character."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.redacted(text) if len(self.text) >= _PLACEHOLDER else text


def read_key(config: MTBenchConfig) -> Key:
    """The key and where it is from: the file, its owner's alone, or the environment variable, which
    may be unset.

    Raises JudgeError for a key that no HTTP header can hold: the library's own error would quote
    it.
    """
    if not config.judge_key_file:
        key, place = os.environ.get(config.judge_key_variable, "").strip(), config.judge_key_variable
    else:
        key, place = _key_of_file(config.judge_key_file)
    if not all("!" <= character <= "~" for character in key):
        raise JudgeError(
            f"{place}: expected the key and nothing else: visible ASCII characters, no space or line break within"
        )
    return Key(key, place)


def _key_of_file(name: str) -> tuple[str, str]:
    """(key, path of the file)."""
    field, expected = f"mtbench.judge_key_file = {name!r}", "expected a file that holds the key and nothing else"
    try:
        path = Path(name).expanduser()
        key = read_private(path, _LONGEST).strip()
    except OSError as error:
        raise JudgeError(f"{field}: {error.strerror}; {expected}") from None
    except (ValueError, RuntimeError) as error:  # RuntimeError: ~user for a user that does not exist
        raise JudgeError(f"{field}: {error}; {expected}") from None
    if not key:
        raise JudgeError(f"{field}: it is empty; {expected}")
    return key, str(path)
