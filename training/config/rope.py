"""A rotary embedding (Su et al. 2021) as Hugging Face's config.json states it. Standard library
only; training/models/rotary.py computes the angles."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.hf_config import ConfigFile
from training.errors import ConfigError

DEFAULT_BASE = 10000.0
"""transformers' base where config.json names none."""
KINDS = ("default", "llama3")
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What "llama3" is described by; transformers requires the first three."""


@dataclass(frozen=True)
class Rope:
    """``kind`` "default": pair i of a head's ``dim`` components turns by base^(-2 i / dim) radians
    a position. "llama3" (Llama 3.1): long wavelengths are stretched by ``factor``, short ones stay,
    and those between are interpolated."""

    base: float
    kind: str = "default"
    factor: float = 1.0
    """How many times further apart positions may be than in pretraining."""
    low_freq_factor: float = 1.0
    """Wavelengths above ``original_positions / low_freq_factor`` are stretched whole."""
    high_freq_factor: float = 1.0
    """Wavelengths below ``original_positions / high_freq_factor`` stay."""
    original_positions: int = 0
    """Tokens of a row in pretraining."""

    @classmethod
    def read(cls, config: ConfigFile, positions: int) -> Rope:
        """Of a config.json with ``max_position_embeddings`` = ``positions``. Raises ConfigError for
        kinds that are not computed and for tables that contradict each other.

        transformers 5 takes the first of rope_scaling and rope_parameters that is not empty, and
        rope_theta from there, then from the top level; transformers 4 only from the top level. A
        file that names several must name the same.
        """
        tables = {name: config.table(name) for name in ("rope_scaling", "rope_parameters")}
        config.only("partial_rotary_factor", 1.0, 1)
        kinds = {name: _kind(config, name, table) for name, table in tables.items() if table}
        base = _base(config, tables)
        scalings = {name: _llama3(config, name, tables[name], positions) for name in kinds if kinds[name] == "llama3"}
        if scalings and len(scalings) < len(kinds) or len(set(scalings.values())) > 1:
            raise ConfigError(
                f"{config.path}: rope_scaling = {tables['rope_scaling']} and rope_parameters = "
                f"{tables['rope_parameters']} contradict each other, and which one counts depends on the version of "
                "transformers; keep the one that the model was trained with"
            )
        return cls(base, "llama3", *next(iter(scalings.values()))) if scalings else cls(base)


def _kind(config: ConfigFile, name: str, table: dict) -> str:
    named = [table[key] for key in ("rope_type", "type") if key in table]
    if any(kind not in KINDS for kind in named) or len(set(named)) > 1 or table.get("partial_rotary_factor", 1.0) != 1:
        raise ConfigError(
            f"{config.path}: {name} = {table}: this scaled or partial rotary embedding is not supported; take a model "
            f"whose rope_type is one of {', '.join(KINDS)}"
        )
    return named[0] if named else "default"


def _base(config: ConfigFile, tables: dict[str, dict]) -> float:
    named = {f"{name}.rope_theta": table["rope_theta"] for name, table in tables.items() if "rope_theta" in table}
    if "rope_theta" in config.values and (not named or config.values["rope_theta"] is not None):
        named["rope_theta"] = config.values["rope_theta"]
    bases = {name: config.rope_base(name, value) for name, value in named.items()}
    if tables["rope_scaling"] and "rope_parameters.rope_theta" in bases and len(bases) == 1:
        bases["rope_scaling.rope_theta (not there: the default)"] = DEFAULT_BASE
    config.agree(bases)
    return next(iter(bases.values()), DEFAULT_BASE)


def _llama3(config: ConfigFile, name: str, table: dict, positions: int) -> tuple[float, float, float, int]:
    """The values of LLAMA3, checked as transformers does."""
    numbers = []
    for key in LLAMA3[:3]:
        value = table.get(key)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            raise config.wrong(f"{name}.{key}", value, "a number above 0")
        numbers.append(float(value))
    factor, low, high = numbers
    if factor < 1:
        raise config.wrong(f"{name}.factor", factor, "a number of at least 1")
    if high <= low:
        raise config.wrong(f"{name}.high_freq_factor", high, f"more than low_freq_factor = {low}")
    outer = config.values.get(LLAMA3[3])
    original = table.get(LLAMA3[3], positions) if outer is None else outer
    if type(original) is not int or original < 1:
        raise config.wrong(f"{name}.{LLAMA3[3]}", original, "a whole number above 0")
    return factor, low, high, original
