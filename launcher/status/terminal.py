"""The terminal: text of other programs and people, which may hold what would steer it; and how wide
the output is."""

from __future__ import annotations

import re
import shutil
import sys

import click

PIPE_WIDTH = 200
"""Columns where the output is a file or a pipe."""
LEAST_WIDTH, UNKNOWN_WIDTH, UNKNOWN_ROWS = 20, 80, 24
"""Columns below which nothing can be read, and the size of a terminal that does not know its
own."""
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Controls (ESC and its 8-bit forms among them), marks that turn the direction of writing, halves
of characters; not tab and line end."""


def plain(text: object) -> str:
    """The text with each of UNSEEN replaced: it moves no cursor, sets no title, hides and reverses
    nothing."""
    return UNSEEN.sub("\ufffd", str(text))


def say(text: object, err: bool = False) -> None:
    """Print text that is not all ours."""
    click.echo(plain(text), err=err)


def width() -> int:
    """Columns for what is printed: never fewer than LEAST_WIDTH, whatever the terminal or COLUMNS
    say."""
    return (
        columns_of(shutil.get_terminal_size((PIPE_WIDTH, UNKNOWN_ROWS)).columns) if sys.stdout.isatty() else PIPE_WIDTH
    )


def columns_of(reported: int) -> int:
    """A terminal that says 0 (a job's, an editor's, a new pseudo terminal) does not know."""
    return max(reported, LEAST_WIDTH) if reported > 0 else UNKNOWN_WIDTH
