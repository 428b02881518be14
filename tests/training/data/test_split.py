"""Held-out prompts and repeated rows found without keeping rows: the same as with all of them in
memory."""

from __future__ import annotations

import hashlib
import random
import tracemalloc

import pytest

from training.config.data import DataConfig
from training.data import split
from training.data.split import HeldOut, Repeats


def held_out(prompts: list[str], data: DataConfig) -> set[str]:
    """By the rule's own words, all prompts in memory."""
    distinct = {" ".join(prompt.lower().split()) for prompt in prompts}
    number = min(max(1, round(data.heldout * len(distinct))), max(1, data.heldout_max)) if len(distinct) > 1 else 0
    return set(sorted(distinct, key=lambda key: hashlib.sha256(f"{data.seed}\0{key}".encode()).digest())[:number])


@pytest.mark.parametrize(
    ("rows", "share", "most"), [(2, 0.05, 256), (300, 0.05, 256), (300, 0.5, 20), (3000, 0.1, 7), (3000, 0.1, 0)]
)
def test_held_out_prompts_are_those_of_the_rule(rows, share, most):
    rng = random.Random(rows)
    prompts = [f"Is  it {rng.randrange(rows * 2 // 3 + 1)}?" for _ in range(rows)]
    data = DataConfig(heldout=share, heldout_max=most, seed=3)
    found = HeldOut(data)
    for prompt in prompts:
        found.add(found.place(prompt))
    chosen = found.chosen()
    assert {split.same_prompt(prompt) for prompt in prompts if found.place(prompt) in chosen} == held_out(prompts, data)


def test_repeated_rows_are_found_and_the_first_of_them_is_not_one(tmp_path, monkeypatch):
    monkeypatch.setattr(split, "AT_ONCE", 100)
    rng = random.Random(0)
    texts = [str(rng.randrange(600)) for _ in range(1050)]
    found, seen, expected = Repeats(tmp_path), set(), []
    for text in texts:
        found.add(text)
        expected.append(text in seen)
        seen.add(text)
    assert found.flags().tolist() == expected and 0 < sum(expected) < 1050
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """15,000 rows against 5,000: a byte a row more, and what sorting a bucket takes."""
    monkeypatch.setattr(split, "AT_ONCE", 500)
    peaks = []
    for rows in (5_000, 15_000):
        tracemalloc.start()
        heldout, repeats = HeldOut(DataConfig(heldout_max=50)), Repeats(tmp_path)
        for number in range(rows):
            heldout.add(heldout.place(f"prompt {number}"))
            repeats.add(f"row {number}")
        assert len(heldout.chosen()) == 50 and not repeats.flags().any()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 10_000 * 4
