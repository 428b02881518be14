"""Keys of a run (W&B, a judge): read from a file that only its owner can read, given to the ranks' environment and to nothing else.

A profile names the file (``secrets = "~/.config/convoy.env"``). Only its path is ever written: not into a script, a log, a manifest or
an argument. The file is read on the compute node when the ranks start; it is never run by a shell.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from launcher.profile import Profile
from training.settings import ConfigError

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SHORTEST = 8
"""Characters of the shortest secret: masking a shorter one would blot out half a log."""
OURS = re.compile(r"(RANK|WORLD_SIZE|LOCAL_RANK|MASTER_ADDR|MASTER_PORT|PATH|LD_PRELOAD|CUDA_VISIBLE_DEVICES|SLURM\w*|SBATCH\w*|SRUN\w*)")
MASK = "********"


def read(path: str | Path) -> dict[str, str]:
    """Variables of the file's ``KEY=VALUE`` lines; blank lines and ``#`` lines are skipped, quotes around a whole value are dropped.

    ConfigError for a file that is not there, not the user's own, open to others, or badly written; no message holds a value.
    """
    path = Path(path).expanduser()
    try:
        with open(path, encoding="utf-8") as file:  # the checks are of the file that is read, not of one put in its place
            _check_private(path, os.fstat(file.fileno()))
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"secrets = {str(path)!r}: {why}; make it: install -m 600 /dev/null {path}, then add KEY=VALUE lines") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            name, value = _parse(line, f"{path} line {number}")
            found[name] = value
    return found


def mask(text: str, values) -> str:
    """``text`` with every secret in it replaced; ``values`` are the secrets (or the mapping that ``read`` returned)."""
    for value in sorted(values.values() if isinstance(values, dict) else values, key=len, reverse=True):
        text = text.replace(value, MASK)
    return text


def names(profile: Profile) -> tuple[str, ...]:
    """Names of the variables in the profile's file; ConfigError where ``read`` raises it."""
    return tuple(read(profile.secrets)) if profile.secrets else ()


def _check_private(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"secrets = {str(path)!r}: not a file; expected one with KEY=VALUE lines")
    if info.st_uid != os.geteuid():
        raise ConfigError(f"secrets = {str(path)!r}: belongs to user {info.st_uid}, you are {os.geteuid()}; copy it to a file of yours")
    if mode := stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"secrets = {str(path)!r}: others may use it (mode {stat.S_IMODE(info.st_mode):03o}, {mode:03o} too much): "
                          f"chmod 600 {path}, and take its keys for known if the machine is shared")


def _parse(line: str, where: str) -> tuple[str, str]:
    """(name, value) of one line; the line itself is in no message, it may hold a secret."""
    name, equals, value = line.strip().removeprefix("export ").partition("=")
    name, value = name.strip(), value.strip()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    if not equals or not NAME.fullmatch(name):
        raise ConfigError(f"{where}: expected KEY=VALUE with a name of letters, digits and '_'")
    if OURS.fullmatch(name):
        raise ConfigError(f"{where}: {name} is set by the launcher; remove the line")
    if len(value) < SHORTEST or not value.isprintable():
        raise ConfigError(f"{where}: the value of {name} has {len(value)} characters; expected {SHORTEST} or more, all printable: a "
                          "shorter one can't be hidden in logs. What is no secret goes to the profile's table environment")
    return name, value
