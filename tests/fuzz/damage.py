"""Damaged JSON and bytes for the fuzzers of tests/fuzz: seeded, so that a number names an input.
Standard library only.

for number in range(1000):
    rng = random.Random(number)
    path.write_bytes(damaged_text(rng, value))      # JSON that no json.dumps writes, too
    with within(5):                                 # a hang becomes an error
        take_in(path)                               # must end, or raise the error of bad input
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Iterator

DEEP = 100_000
"""Levels of nesting that no parser with a stack survives."""
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    " ",
    "x",
    "0",
    "null",
    "nan",
    "../../x",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "\ud800",
    "\x1b[2J\x1b]0;x\7",
    "\u202e\u0301",
    "<script>",
    "{{ 1 }}",
    "{% for i in range(9) %}",
    "a" * 5000,
    "9" * 5000,
    [],
    [1],
    ["a"],
    [None],
    [[[]]],
    [[], {}],
    {},
    {"a": 1},
    {"content": 5},
    {"content": "x"},
    {"": None},
)
"""What a value is replaced by: other types, numbers beyond every range, names of other places, text
that is none."""
TOKENS = (
    b"NaN",
    b"-Infinity",
    b"1e999999",
    b"-",
    b"9" * 5000,
    b'"',
    b"'",
    b"{",
    b"]",
    b",,",
    b"\\u",
    b"\\ud800",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"//",
    b"null",
    b"\x1b[31m",
)
"""What is put between a text's bytes."""


def damaged_json(rng: random.Random, value):
    """A copy of ``value`` (anything JSON has) with one to three places damaged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _once(rng, value)
    return value


def damaged_text(rng: random.Random, value) -> bytes:
    """A file that should hold ``value``: mostly JSON with damaged values, else a text that is
    damaged or no JSON."""
    kind = rng.random()
    text = json.dumps(damaged_json(rng, value) if kind < 0.85 else value).encode()
    # a key that is there twice
    if kind < 0.05 and isinstance(value, dict) and value and text[:2] == b'{"':
        text = b"{" + json.dumps({rng.choice(list(value)): rng.choice(VALUES)}).encode()[1:-1] + b", " + text[1:]
    if kind >= 0.75:
        text = damaged_bytes(rng, text)
    return text


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    """``data`` cut off, emptied, with bytes changed, lines doubled or lost, something put in, or
    nested too deeply."""
    kind, at = rng.randrange(10), rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[at:]
    if kind == 2:
        return rng.choice(
            (
                b"",
                b" ",
                b"\n",
                b"null",
                b"[]",
                b"{}",
                b'"x"',
                b"0",
                b"\0" * 100,
                b"version https://git-lfs.github.com/x",
            )
        )
    if kind == 3:
        return _nested(rng)
    if kind == 4:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8) if data else 0):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(changed)
    if kind == 5:
        end = min(len(data), at + rng.randint(1, 200))
        return data[:end] + data[at:]
    if kind == 6:
        return data[:at] + data[at + rng.randint(1, 200) :]
    if kind == 7:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 8:
        return data.decode("latin-1").encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-be")))
    return data[:at] + rng.choice(TOKENS) + data[at:]


COUNTS: Counter[str] = Counter()
"""File of a fuzzer -> damaged inputs that it has tried in this process (tests/fuzz/conftest.py
prints them)."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError where the block, one damaged input, takes longer; for the main thread."""

    def end(*_):
        raise TimeoutError(f"still at it after {seconds} s")

    COUNTS[os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]] += 1
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_mb() -> float:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _nested(rng: random.Random) -> bytes:
    start, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b'[{"b":', b"}]")))
    return start * DEEP + rng.choice((b"", b"1" + end * DEEP))


def _once(rng: random.Random, value):
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(VALUES))
    parent, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice((f"{key}x", key.upper(), "", f" {key}", "\ud800"))] = parent.pop(key)
    elif kind == 2:
        _double(parent, key)
    elif kind == 3:
        other, place = rng.choice(places)
        parent[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(parent[key])
    elif kind == 4 and type(parent[key]) in (int, float):
        number = parent[key]
        parent[key] = rng.choice((-number, number + 1, number - 1, str(number), [number], number * 10**9))
    elif kind == 4 and isinstance(parent[key], str):
        parent[key] = damaged_bytes(rng, parent[key].encode("utf-8", "replace")).decode("utf-8", "replace")[:10_000]
    else:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _double(parent: dict | list, key) -> None:
    if isinstance(parent, dict):
        parent[f"{key}_2"] = copy.deepcopy(parent[key])
    else:
        parent.insert(key, copy.deepcopy(parent[key]))


def _places(value, most: int = 40) -> Iterator[tuple]:
    """(dict or list, key) of every value inside ``value``; of a long list or table its first
    ``most``."""
    if isinstance(value, (dict, list)):
        keys = list(value)[:most] if isinstance(value, dict) else range(min(len(value), most))
        for key in keys:
            yield value, key
            yield from _places(value[key], most)
