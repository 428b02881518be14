"""Hugging Face's config.json, value by value: each of the type and in the range that transformers
takes. Standard library only.

Types are exact, as transformers' own since 5.0: true is no number, 256.0 and "256" are no whole
numbers. Python's JSON has NaN and Infinity; they are refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from training.errors import ConfigError
from training.files import hf_folder

MOST = 2**31 - 1
"""Of a whole number: more is no size of a model."""
FIX = "correct config.json, or download it again"
TYPE_NAMES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number with a decimal point",
    list: "a list",
    dict: "an object",
    str: "a string",
}
"""JSON's types in words."""
ABSENT = object()


@dataclass(frozen=True)
class ConfigFile:
    """A config.json that is being read; every complaint names it."""

    path: Path
    values: dict

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        values = hf_folder.json_object(path.parent, path.name)
        if values is None:
            raise ConfigError(f"model.checkpoint: {path} is missing; expected a Hugging Face folder with config.json")
        return cls(path, values)

    def wrong(self, name: str, value, expected: str, fix: str = FIX) -> ConfigError:
        return ConfigError(f"{self.path}: {name} = {_short(value)}: expected {expected}; {fix}")

    def first(self, *names: str, default=ABSENT) -> tuple[str, object]:
        """(name, value) of what is known under several names: transformers has renamed some over
        the years. null beside a value is none.

        Raises ConfigError where two disagree: which one wins depends on the version of
        transformers.
        """
        found = {name: self.values[name] for name in names if name in self.values}
        found = {name: value for name, value in found.items() if value is not None} or found
        if not found and default is ABSENT:
            raise ConfigError(
                f"{self.path}: none of {', '.join(names)} is there (model_type = {self.values.get('model_type')!r}); "
                "is it the config.json of a language model?"
            )
        self.agree(found)
        return next(iter(found.items()), (names[0], default))

    def agree(self, found: dict[str, object]) -> None:
        """Raises ConfigError where the values of one thing, under several names, are not the
        same."""
        if any(type(one) is not type(other) or one != other for one, other in combinations(found.values(), 2)):
            said = " and ".join(f"{name} = {_short(value)}" for name, value in found.items())
            raise ConfigError(
                f"{self.path}: {said} contradict each other, and which one counts depends on the version of "
                "transformers; keep the one that the model was trained with"
            )

    def whole_number(self, *names: str, default=ABSENT) -> int:
        name, number = self.first(*names, default=default)
        if type(number) is not int or not 1 <= number <= MOST:
            raise self.wrong(name, number, f"a whole number above 0, at most {MOST}")
        return number

    def epsilon(self, name: str, default=ABSENT) -> float:
        """Of a norm."""
        name, number = self.first(name, default=default)
        if type(number) is not float or not 0 < number < 1:
            raise self.wrong(name, number, "a number above 0 and below 1, such as 1e-05")
        return number

    def rope_base(self, name: str, number) -> float:
        """``number``, named ``name``, as the base of a rotary embedding."""
        # float32's largest; False for NaN
        if type(number) not in (int, float) or not 1 < number < 1e38:
            raise self.wrong(name, number, "a finite number above 1")
        return float(number)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, value, TYPE_NAMES[bool])
        return value

    def table(self, name: str) -> dict:
        """An object of its own; {} where it is not there or null."""
        value = self.values.get(name)
        if value is not None and type(value) is not dict:
            raise self.wrong(name, value, "an object, {...}, or null")
        return value or {}

    def only(self, name: str, *allowed) -> None:
        """``name`` is not there or one of ``allowed``, of which the first is what a missing one
        means."""
        value = self.values.get(name, allowed[0])
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise ConfigError(f"{self.path}: {name} = {_short(value)}; only {allowed[0]!r} is supported")

    def types(self, allowed: dict[str, tuple[type, ...]]) -> None:
        """What training does not read but transformers refuses where it is of another type: the
        evaluation would end there."""
        for name, kinds in allowed.items():
            if name in self.values and type(self.values[name]) not in kinds:
                raise self.wrong(name, self.values[name], " or ".join(TYPE_NAMES[kind] for kind in kinds))
            if type(self.values.get(name)) is float and not math.isfinite(self.values[name]):
                raise self.wrong(name, self.values[name], "a finite number")


TOKEN, NUMBER = (int, type(None)), (int, float)
COMMON = {
    "use_cache": (bool,),
    "initializer_range": (float,),
    "bos_token_id": TOKEN,
    "pad_token_id": TOKEN,
    "eos_token_id": (int, list, type(None)),
}
"""What every family's config.json may say beside the model's shape, and its types in transformers
5."""


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
