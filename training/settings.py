"""How a stage's dataclass is made from a table: unknown keys, wrong types and contradictions name the key, its value and the fix.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from pathlib import Path

MOST = 2**63 - 1
"""Largest whole number of a setting: what NumPy and TOML hold."""


class ConfigError(ValueError):
    """A user's mistake: the message names the key, its value, what was expected and the fix."""


class InvariantError(AssertionError):
    """What always holds does not: a bug. Unlike ``assert`` it also guards a run under ``python -O``."""


def at_least(config, smallest: int, *names: str) -> None:
    for name in names:
        if not smallest <= getattr(config, name) < math.inf:  # NaN is refused, too
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least {smallest}")


def below(config, limit: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) < limit:
            raise ValueError(f"{name} = {getattr(config, name)}: expected below {limit}")


def positive(config, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:  # NaN is refused, too
            raise ValueError(f"{name} = {getattr(config, name)}: expected a number above 0")


def number(config, *names: str) -> None:
    for name in names:
        if math.isnan(getattr(config, name)):
            raise ValueError(f"{name} = nan: expected a number; inf or -inf never says no")


def one_of(config, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} = {getattr(config, name)!r}: expected one of {', '.join(allowed)}")


def build(cls, values: dict, where: str):
    """Make ``cls`` from a mapping (nested dataclasses from nested mappings); ``where`` is the section in messages.

    Raises ConfigError for an unknown key (with the nearest valid one), a wrong type, a missing key or a contradiction.
    """
    types = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    made = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1) or sorted(k for k in known if k != "paths")
            raise ConfigError(f"{where}.{key}: no such key; did you mean {', '.join(f'{where}.{n}' for n in near)}?")
        made[key] = _value(types[key], value, f"{where}.{key}")
    missing = [f.name for f in known.values() if f.name not in made
               and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    try:
        return cls(**made)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None


def _value(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} = {value!r}: expected a table")
        return build(kind, value, where)
    if isinstance(value, int) and abs(value) > MOST:
        raise ConfigError(f"{where}: expected a number of at most {MOST:,}, got one beyond it")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    base = typing.get_origin(kind) or kind
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: expected {base.__name__}, got {type(value).__name__}")
    return value


def load(cls, path: str | Path):
    """The stage's configuration from its one argument, a JSON file."""
    return build(cls, json.loads(Path(path).read_text(encoding="utf-8")), Path(path).parent.name)
