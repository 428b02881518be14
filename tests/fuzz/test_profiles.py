"""Damaged profiles, configuration files, --set and --sweep: each is taken in, or refused in words
that name it. No traceback, no hang."""

import dataclasses
import json
import random
import sys
from collections import Counter

from launcher.config import key_file
from launcher.config.sections import RECIPES, layered
from launcher.config.stages import PIPELINES, PPO, full_tables
from launcher.slurm import sites
from launcher.submit.sweep import combinations
from tests.fuzz.damage import VALUES, damaged_bytes, damaged_json, peak_mb, within
from training.errors import ConfigError

PROFILES, RECIPES_READ, SETS, KEYS = 800, 400, 500, 300
SECONDS, MB = 5, 100


def toml(value) -> str:
    """A value as TOML writes it; JSON's text where TOML has no such value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text := json.dumps(value), text)


def document(tables) -> bytes:
    lines = (
        [f"{json.dumps(str(key))} = {toml(value)}" for key, value in tables.items()]
        if isinstance(tables, dict)
        else [toml(tables)]
    )
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def outcome_of(number: int, take_in, *names: str) -> str:
    """Whether an input is taken in, or refused by an error that names one of ``names``."""
    try:
        with within(SECONDS):
            take_in()
    except ConfigError as refused:
        assert any(name in str(refused) for name in names), (number, str(refused))
        return "refused"
    except Exception as error:
        raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
    return "taken in"


def told(what: str, outcomes: Counter, before: float) -> None:
    print(f"{sum(outcomes.values())} damaged {what}: {dict(outcomes)}", file=sys.stderr)
    assert peak_mb() - before < MB and outcomes["refused"] > sum(outcomes.values()) / 4, outcomes


def test_profiles(tmp_path):
    sound, outcomes, before, path = dataclasses.asdict(sites.load("a100")), Counter(), peak_mb(), tmp_path / "site.toml"
    sound |= {"environment": {"A": "b"}, "options": {"nice": "10"}, "modules": ["cuda"], "setup": ["true"]}
    for number in range(PROFILES):
        rng = random.Random(number)
        text = document(damaged_json(rng, sound))
        path.write_bytes(damaged_bytes(rng, text) if rng.random() < 0.3 else text)
        outcomes[outcome_of(number, lambda: sites.load(str(path)), "site", "profile", "secrets")] += 1
    told("profiles", outcomes, before)


def test_configuration_files(tmp_path):
    names, outcomes, before, path = (
        sorted(file.stem for file in RECIPES.glob("*.toml")),
        Counter(),
        peak_mb(),
        tmp_path / "more.toml",
    )
    for number in range(RECIPES_READ):
        rng = random.Random(number)
        tables = layered(rng.choice(names), [], [])
        text = document(damaged_json(rng, {section: tables[section] for section in rng.sample(list(tables), 2)}))
        path.write_bytes(damaged_bytes(rng, text) if rng.random() < 0.3 else text)

        def take_in(path=path):
            full_tables(tmp_path, layered("bloom-tiny", [path], []), PIPELINES[PPO])

        outcomes[outcome_of(number, take_in, "more.toml", *tables)] += 1
    told("configuration files", outcomes, before)


def test_settings(tmp_path):
    tables, outcomes, before = layered("bloom-tiny", [], []), Counter(), peak_mb()
    keys = [f"{section}.{key}" for section, values in tables.items() for key in values]
    for number in range(SETS):
        rng = random.Random(number)
        some = rng.choice(VALUES)
        value = rng.choice((toml(some), repr(some), "1,2", "[", '"', "", "1e5", "=", "a=b"))
        text, swept = f"{rng.choice(keys)}={value}", rng.random() < 0.2
        if rng.random() < 0.3:
            text = damaged_bytes(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")[:10_000]

        def take_in(text=text, swept=swept):
            if swept:
                combinations([text])
            else:
                full_tables(tmp_path, layered("bloom-tiny", [], [text]), PIPELINES[PPO])

        outcomes[outcome_of(number, take_in, "--set", "--sweep", *tables)] += 1
    told("settings", outcomes, before)


def test_files_of_secrets(tmp_path):
    sound = b"# W&B\nWANDB_API_KEY=0123456789abcdef\nexport B='quoted value'\n"
    outcomes, before, path = Counter(), peak_mb(), tmp_path / "s.env"
    path.touch(0o600)
    for number in range(KEYS):
        path.write_bytes(damaged_bytes(random.Random(number), sound))
        outcomes[outcome_of(number, lambda: key_file.read(path), "s.env")] += 1
    print(f"{KEYS} damaged files of secrets: {dict(outcomes)}", file=sys.stderr)
    assert outcomes["refused"] > KEYS / 20 and peak_mb() - before < MB
