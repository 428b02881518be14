"""Text of other programs and people on a terminal: a log's line, a cause, a name may hold what would steer it."""

from __future__ import annotations

import re

import click

UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Controls (ESC and its 8-bit forms among them), marks that turn the direction of writing, halves of characters; not tab and line end."""


def plain(text: object) -> str:
    """The text with each of UNSEEN replaced: it moves no cursor, sets no title, hides and reverses nothing."""
    return UNSEEN.sub("\ufffd", str(text))


def say(text: object, err: bool = False) -> None:
    """Print text that is not all ours."""
    click.echo(plain(text), err=err)
