"""Keys of a run (W&B, a judge): read from a file that only its owner can read, given to the ranks'
environment and to nothing else.

A profile names the file (``secrets = "~/.config/convoy.env"``). Only its path is ever written: not
into a script, a log, a manifest or an argument. The file is read on the compute node when the ranks
start; it is never run by a shell.
"""

from __future__ import annotations

import base64
import functools
import html
import json
import os
import re
import shlex
from pathlib import Path
from urllib.parse import quote, quote_plus

from eval.files.private import read_private
from launcher.config.profile import Profile
from training.errors import ConfigError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SHORTEST = 8
"""Characters of the shortest secret: masking a shorter one would blot out half a log."""
OWN_NAMES = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PATH|LD_PRELOAD|CUDA_VISIBLE_DEVICES|SLURM\w*|SBATCH\w*|SRUN\w*)"
)
MASK = "********"
ESCAPE = re.compile(r"%[0-9A-F]{2}|(?<=u)[0-9a-f]{4}|(?<=x)[0-9a-f]{2}")
"""Digits of an escape, which programs write in capitals or not."""
MOST = 1 << 20
"""Bytes of the file at most."""


def read(path: str | Path) -> dict[str, str]:
    """Variables of the file's ``KEY=VALUE`` lines; blank lines and ``#`` lines are skipped, quotes
    around a whole value are dropped.

    ConfigError for a file that is not there, not the user's own, open to others, or badly written;
    no message holds a value.
    """
    try:
        path = Path(path).expanduser()
        lines = read_private(path, MOST, os.geteuid()).splitlines()
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user for a user that does not exist
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"secrets = {str(path)!r}: {why}; make it: install -m 600 /dev/null {path}, then add KEY=VALUE lines"
        ) from None
    except ValueError as error:
        raise ConfigError(f"secrets = {str(path)!r}: {error}; expected a file with KEY=VALUE lines") from None
    forms_found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, value = _parse(line, f"{path} line {number}")
            forms_found[name] = value
    return forms_found


def mask(text: str, values) -> str:
    """``text`` with every secret in it replaced, also where it is written as in JSON, Python, a
    URL, HTML, a shell or base64; ``values`` are the secrets (or the mapping that ``read``
    returned)."""
    known = tuple(values.values() if isinstance(values, dict) else values)
    return _pattern(known).sub(MASK, text) if known else text


@functools.lru_cache(maxsize=8)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    forms_found = {form for value in values for form in forms(value)}
    patterns = map(re.escape, sorted(forms_found, key=len, reverse=True))
    return re.compile("|".join(ESCAPE.sub(lambda code: f"(?i:{code[0]})", pattern) for pattern in patterns))


def forms(value: str) -> set[str]:
    """The ways in which programs write a value: as it is, escaped for JSON, Python, a URL, HTML or
    a shell, and in base64, alone or among other bytes (of which only the part is known that no
    neighbour changes)."""
    forms_found = {
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        ascii(value)[1:-1],
        html.escape(value),
        html.escape(value, quote=False),
        shlex.quote(value).strip("'"),
    }
    forms_found |= {form.replace("/", "\\/") for form in forms_found}  # as PHP and some JSON writers do
    for quoted in (quote(value), quote(value, safe=""), quote_plus(value)):
        forms_found.add(quoted)
    for before in range(3):
        raw = b"\0" * before + value.encode()
        part = base64.b64encode(raw)[-(-before * 4 // 3) : len(raw) * 4 // 3].decode()
        forms_found |= {part, part.translate(str.maketrans("+/", "-_"))}
    return {form for form in forms_found if len(form) >= SHORTEST}


def names(profile: Profile) -> tuple[str, ...]:
    """Names of the variables in the profile's file; ConfigError where ``read`` raises it."""
    return tuple(read(profile.secrets)) if profile.secrets else ()


def _parse(line: str, where: str) -> tuple[str, str]:
    """(name, value) of one line; the line itself is in no message, it may hold a secret."""
    name, equals, value = line.strip().removeprefix("export ").partition("=")
    name, value = name.strip(), value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if not equals or not NAME.fullmatch(name):
        raise ConfigError(f"{where}: expected KEY=VALUE with a name of letters, digits and '_'")
    if OWN_NAMES.fullmatch(name):
        raise ConfigError(f"{where}: {name} is set by the launcher; remove the line")
    if len(value) < SHORTEST or not value.isprintable():
        raise ConfigError(
            f"{where}: the value of {name} has {len(value)} characters; expected {SHORTEST} or more, all printable: a "
            "shorter one can't be hidden in logs. What is no secret goes to the profile's table environment"
        )
    return name, value
