"""Read a Hugging Face config.json. Each value must have the type and range that transformers takes.

Types are exact, as in transformers since 5.0: true is no number, 256.0 and "256" are no whole
numbers. NaN and Infinity, which Python's JSON reads, are refused. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from training.errors import ConfigError
from training.files import hf_folder

MAX_SIZE = 2**31 - 1
"""Largest whole number: no model has a larger size."""
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
"""Python type -> name of the JSON type in messages."""
ABSENT = object()


@dataclass(frozen=True)
class ConfigFile:
    """A config.json that is being read. Every error names its path."""

    path: Path
    values: dict

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Raises ConfigError where the file is missing or holds no JSON object."""
        values = hf_folder.json_object(path.parent, path.name)
        if values is None:
            raise ConfigError(f"model.checkpoint: {path} is missing; expected a Hugging Face folder with config.json")
        return cls(path, values)

    def wrong(self, name: str, value, expected: str, fix: str = FIX) -> ConfigError:
        """The error for a value that is not as ``expected``."""
        return ConfigError(f"{self.path}: {name} = {_short(value)}: expected {expected}; {fix}")

    def first(self, *names: str, default=ABSENT) -> tuple[str, object]:
        """(name, value) of the first of ``names`` that is there: transformers has renamed some
        fields over the years. null counts only where no other name has a value.

        Raises ConfigError where none is there and no ``default`` is given, and where two values
        differ: which one wins depends on the version of transformers.
        """
        values = {name: self.values[name] for name in names if name in self.values}
        values = {name: value for name, value in values.items() if value is not None} or values
        if not values and default is ABSENT:
            raise ConfigError(
                f"{self.path}: none of {', '.join(names)} is there (model_type = {self.values.get('model_type')!r}); "
                "is it the config.json of a language model?"
            )
        self.agree(values)
        return next(iter(values.items()), (names[0], default))

    def agree(self, values: dict[str, object]) -> None:
        """Raises ConfigError unless one field has the same value under all its names."""
        if any(type(one) is not type(other) or one != other for one, other in combinations(values.values(), 2)):
            differing = " and ".join(f"{name} = {_short(value)}" for name, value in values.items())
            raise ConfigError(
                f"{self.path}: {differing} contradict each other, and which one counts depends on the version of "
                "transformers; keep the one that the model was trained with"
            )

    def whole_number(self, *names: str, default=ABSENT) -> int:
        """A whole number from 1 to MAX_SIZE, under the first of ``names`` that is there."""
        name, number = self.first(*names, default=default)
        if type(number) is not int or not 1 <= number <= MAX_SIZE:
            raise self.wrong(name, number, f"a whole number above 0, at most {MAX_SIZE}")
        return number

    def epsilon(self, name: str, default=ABSENT) -> float:
        """Epsilon of a norm, above 0 and below 1."""
        name, number = self.first(name, default=default)
        if type(number) is not float or not 0 < number < 1:
            raise self.wrong(name, number, "a number above 0 and below 1, such as 1e-05")
        return number

    def rope_base(self, name: str, number) -> float:
        """``number``, the value of ``name``, as the base of a rotary embedding: finite, above 1."""
        # float32's largest; False for NaN
        if type(number) not in (int, float) or not 1 < number < 1e38:
            raise self.wrong(name, number, "a finite number above 1")
        return float(number)

    def boolean(self, name: str, default: bool) -> bool:
        """true or false; ``default`` where the field is missing."""
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, value, TYPE_NAMES[bool])
        return value

    def table(self, name: str) -> dict:
        """An object; {} where the field is missing or null."""
        value = self.values.get(name)
        if value is not None and type(value) is not dict:
            raise self.wrong(name, value, "an object, {...}, or null")
        return value or {}

    def only(self, name: str, *allowed) -> None:
        """Raises ConfigError unless ``name`` has one of the values ``allowed``. A missing field
        means the first of them."""
        value = self.values.get(name, allowed[0])
        if not any(type(value) is type(each) and value == each for each in allowed):
            raise ConfigError(f"{self.path}: {name} = {_short(value)}; only {allowed[0]!r} is supported")

    def types(self, allowed: dict[str, tuple[type, ...]]) -> None:
        """Raises ConfigError for a field of another type than ``allowed``. Training does not read
        these fields, but transformers refuses them, and the evaluation would end there."""
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
"""Fields of every family's config.json that do not describe the model's shape, and their types in
transformers 5."""


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
