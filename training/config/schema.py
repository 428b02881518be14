"""Build a stage's dataclass from a table. Errors for unknown keys, wrong types and contradictions
name the key, its value and the fix.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
import typing
from pathlib import Path

from training.errors import ConfigError, Mistakes

MAX_INTEGER = 2**63 - 1
"""Largest whole number of a setting: the limit of NumPy and TOML."""


def at_least(config, smallest: int, *names: str) -> None:
    """Raises ValueError unless each field is finite and at least ``smallest``."""
    for name in names:
        if not smallest <= getattr(config, name) < math.inf:  # NaN is refused, too
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least {smallest}")


def below(config, limit: int, *names: str) -> None:
    """Raises ValueError unless each field is below ``limit``."""
    for name in names:
        if not getattr(config, name) < limit:
            raise ValueError(f"{name} = {getattr(config, name)}: expected below {limit}")


def positive(config, *names: str) -> None:
    """Raises ValueError unless each field is finite and above 0."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:  # NaN is refused, too
            raise ValueError(f"{name} = {getattr(config, name)}: expected a number above 0")


def number(config, *names: str) -> None:
    """Raises ValueError for NaN. Infinities are allowed: such a gate never trips."""
    for name in names:
        if math.isnan(getattr(config, name)):
            raise ValueError(f"{name} = nan: expected a number; inf or -inf never says no")


def one_of(config, name: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless the field is one of ``allowed``."""
    if getattr(config, name) not in allowed:
        raise ValueError(f"{name} = {getattr(config, name)!r}: expected one of {', '.join(allowed)}")


def build(cls, values: dict, where: str):
    """Build the dataclass ``cls`` from a mapping, and nested dataclasses from nested mappings.

    ``where``: the section's name in messages. Raises one ConfigError with all unknown keys (each
    with the nearest valid one), wrong types, missing keys and contradictions.
    """
    types = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    valid, mistakes = {}, Mistakes()
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1) or sorted(k for k in fields if k != "paths")
            mistakes.add(f"{where}.{key}: no such key; did you mean {', '.join(f'{where}.{n}' for n in near)}?")
            continue
        count = len(mistakes.messages)
        checked = mistakes.of(_value, types[key], value, f"{where}.{key}")
        if len(mistakes.messages) == count:
            valid[key] = checked
    missing = [
        f.name
        for f in fields.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        mistakes.add(f"{where}: missing {', '.join(missing)}")
    invalid = set(values) & set(fields) - set(valid)
    built = _without_contradictions(cls, valid, invalid, where, mistakes)
    mistakes.raise_if_any()
    return built


def _without_contradictions(cls, values: dict, invalid: set[str], where: str, mistakes: Mistakes):
    """``cls(**values)``, or None. What its checks refuse is added to ``mistakes``.

    The checks stop at the first error. Its key is then removed, so that its default takes its
    place, and the checks run again. An error that mentions a removed or an ``invalid`` key may only
    be a consequence of it and is not added.
    """
    while True:
        try:
            return cls(**values)
        except TypeError:  # a key without default is missing or invalid: reported already
            return None
        except ValueError as error:
            for text in error.messages if isinstance(error, ConfigError) else [str(error)]:
                if not invalid & set(re.findall(r"\w+", text)):
                    mistakes.add(text if isinstance(error, ConfigError) else f"{where}.{text}")
            key = re.match(r"\w*", str(error))[0]
            if key not in values:
                return None
            invalid = invalid | {key}
            values = {name: value for name, value in values.items() if name != key}


def _value(kind, value, where: str):
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} = {value!r}: expected a table")
        return build(kind, value, where)
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ConfigError(f"{where}: expected a number of at most {MAX_INTEGER:,}, got one beyond it")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    base = typing.get_origin(kind) or kind
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: expected {base.__name__}, got {type(value).__name__}")
    return value


def load(cls, path: str | Path):
    """Read the configuration of class ``cls`` from a JSON file, a stage's one argument. Raises
    ConfigError that names the file where it can't be read or is not such a configuration."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; expected a stage's config.json, e.g. runs/NAME/sft/config.json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}; expected a stage's config.json, as submit writes it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a table of keys and values, got {type(values).__name__}")
    return build(cls, values, Path(path).parent.name)


def usage(arguments: list[str], program: str, expected: str, about: str | None) -> int | None:
    """Handle --help and a wrong number of arguments -> the program's exit code, or None if it may
    run.

    ``expected``: the arguments' names, separated by spaces; "..." at the end allows more.
    ``about``: the help text. Returns 0 after --help, 64 after a wrong number of arguments."""
    line = f"usage: python -m {program} {expected}"
    if {"-h", "--help"} & set(arguments):
        print(f"{line}\n\n{(about or '').strip()}")
        return 0
    count = len(expected.split())
    if len(arguments) == count or (expected.endswith("...") and len(arguments) >= count):
        return None
    print(f"{line}; got {len(arguments)} arguments", file=sys.stderr)
    return 64
