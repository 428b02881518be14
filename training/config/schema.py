"""How a stage's dataclass is made from a table: unknown keys, wrong types and contradictions name
the key, its value and the fix.

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

MOST = 2**63 - 1
"""Largest whole number of a setting: what NumPy and TOML hold."""


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
    """Make ``cls`` from a mapping (nested dataclasses from nested mappings); ``where`` is the
    section in messages.

    Raises ConfigError for all unknown keys (with the nearest valid one), wrong types, missing keys
    and contradictions.
    """
    types = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    fitting, mistakes = {}, Mistakes()
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1) or sorted(k for k in known if k != "paths")
            mistakes.add(f"{where}.{key}: no such key; did you mean {', '.join(f'{where}.{n}' for n in near)}?")
            continue
        count = len(mistakes.messages)
        made = mistakes.of(_value, types[key], value, f"{where}.{key}")
        if len(mistakes.messages) == count:
            fitting[key] = made
    missing = [
        f.name
        for f in known.values()
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        mistakes.add(f"{where}: missing {', '.join(missing)}")
    built = _contradictions(cls, fitting, set(values) & set(known) - set(fitting), where, mistakes)
    mistakes.raise_if_any()
    return built


def _contradictions(cls, values: dict, wrong: set[str], where: str, mistakes: Mistakes):
    """``cls(**values)``; what its checks refuse goes to ``mistakes``.

    They stop at the first: its key is then left out, so that its default stands in, and they are
    asked again. What speaks of a key that was left out, or is ``wrong`` already, may be a
    consequence, and is not said.
    """
    while True:
        try:
            return cls(**values)
        except TypeError:  # a key without default is wrong: said already
            return None
        except ValueError as error:
            for text in error.messages if isinstance(error, ConfigError) else [str(error)]:
                if not wrong & set(re.findall(r"\w+", text)):
                    mistakes.add(text if isinstance(error, ConfigError) else f"{where}.{text}")
            key = re.match(r"\w*", str(error))[0]
            if key not in values:
                return None
            wrong = wrong | {key}
            values = {name: value for name, value in values.items() if name != key}


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
    """The stage's configuration from its one argument, a JSON file. ConfigError names the file
    where it is none."""
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
    """Exit code of a program that was asked for help (0) or got other arguments than
    ``expected``, words each (64); None where it
    may run. Nothing else was done before."""
    line = f"usage: python -m {program} {expected}"
    if {"-h", "--help"} & set(arguments):
        print(f"{line}\n\n{(about or '').strip()}")
        return 0
    words = expected.split()
    if len(arguments) == len(words) or (expected.endswith("...") and len(arguments) >= len(words)):
        return None
    print(f"{line}; got {len(arguments)} arguments", file=sys.stderr)
    return 64
