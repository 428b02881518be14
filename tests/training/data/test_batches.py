"""Ids, masks and padding by hand; the order of rows is one for any number of ranks and goes on
exactly after a resume."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from training.data.batches import (
    Example,
    Sampler,
    collate,
    comparison_example,
    padded_length,
    prompt_tokens,
    sft_example,
    shard,
)
from training.data.permutation import Permutation
from training.data.rows import Row
from training.data.tokenised import TextTokenizer
from training.errors import ConfigError

CUE = [101, 102]


class Letters:
    """One id a letter; "#" is the cue's two ids."""

    eos_id, pad_id, bos, stop_ids = 2, 3, (), (2,)

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[number for letter in text for number in (CUE if letter == "#" else [ord(letter)])] for text in texts]

    encode_replies = encode_prompts


def ids(text: str) -> list[int]:
    return Letters().encode_prompts([text])[0]


def tokenised(stage: str, prompt: str, *replies: str, scores=()):
    return TextTokenizer(Letters()).tokenise([Row(prompt, replies, tuple(scores) or (0.0,) * len(replies))], stage)[0]


@pytest.mark.parametrize(
    ("prompt", "response", "seq_length", "tokens", "start", "complete"),
    [
        ("abc#", "xy", 8, ids("abc#xy") + [2], 5, True),
        # one too long: the prompt's first id goes, the EOS stays
        ("abc#", "xy", 7, ids("bc#xy") + [2], 4, True),
        ("abcdef#", "xyz", 8, ids("ef#xyz") + [2], 4, True),
        (
            "abcdef#",
            "uvwxyz",
            8,
            ids("ef#uvwx"),
            4,
            False,
        ),  # the prompt is at half a row: the reply loses its tail and the EOS
        ("#", "uvwxyz", 8, ids("#uvwxyz"), 2, False),
        ("#", "uvwxyz", 9, ids("#uvwxyz") + [2], 2, True),
    ],
)
def test_sft_example(prompt, response, seq_length, tokens, start, complete):
    assert sft_example(tokenised("sft", prompt, response), seq_length) == Example(tokens, start, (), complete)


def test_a_comparison_cuts_its_query_alike_for_all_replies():
    row = tokenised("reward", "abcd#", "x", "xyz", scores=[0.5, 2.0])
    assert comparison_example(row, 8) == [
        (Example(ids("cd#x") + [2], 4), 0.5),
        (Example(ids("cd#xyz") + [2], 4), 2.0),
    ]


def test_a_long_prompt_keeps_its_cue():
    assert prompt_tokens(tokenised("rlhf", "abcdef#", "x"), 4) == ids("ef#")
    assert prompt_tokens(tokenised("rlhf", "a#"), 4) == ids("a#")


def test_collate_by_hand():
    batch = collate([Example([7, 8, 9, 2], 2), Example([7, 2], 1), Example([7, 8, 9, 10, 11], 4)], 3, 6)
    assert batch["tokens"].tolist() == [[7, 8, 9, 2, 3, 3], [7, 2, 3, 3, 3, 3], [7, 8, 9, 10, 11, 3]]
    assert batch["response_mask"].int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert batch["lengths"].tolist() == [4, 2, 5]
    assert (batch["tokens"].dtype, batch["response_mask"].dtype, batch["lengths"].dtype) == (
        torch.int64,
        torch.bool,
        torch.int64,
    )
    with pytest.raises(AssertionError, match="a row of 5 tokens in a batch of length 4"):
        collate([Example([7, 8, 9, 10, 2], 2)], 3, 4)


@pytest.mark.parametrize(("lengths", "multiple", "length"), [([5, 3], 1, 5), ([5, 3], 8, 8), ([8], 8, 8), ([9], 8, 16)])
def test_padded_length(lengths, multiple, length):
    assert padded_length(lengths, multiple) == length


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_no_row_is_lost_or_seen_twice_in_an_epoch(rows, size):
    sampler = Sampler(rows, size, seed=5)
    seen = [index for _ in range(rows * 3) for index in sampler.next_batch()]  # = 3 x size epochs
    for epoch in range(0, len(seen), rows):
        assert sorted(seen[epoch : epoch + rows]) == list(range(rows))
    assert Counter(seen) == {row: 3 * size for row in range(rows)}


def test_the_order_depends_on_seed_and_epoch():
    one, other = Sampler(100, 100, seed=0), Sampler(100, 100, seed=1)
    first = one.next_batch()
    assert first != other.next_batch() and first != one.next_batch() and first != sorted(first)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 255, 257, 5000])
def test_a_permutation_has_every_number_once(n):
    assert sorted(Permutation(n, "7/0")[np.arange(n)].tolist()) == list(range(n))


def test_orders_are_drawn_evenly():
    """All 24 orders of four rows over 4,800 seeds, and each row's place among 40: chi-square within
    five deviations of its mean."""
    orders = Counter(tuple(Permutation(4, f"{seed}/0")[np.arange(4)]) for seed in range(4800))
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 23 + 5 * (2 * 23) ** 0.5
    places = np.zeros((40, 40))
    for epoch in range(2000):
        places[np.arange(40), Permutation(40, f"0/{epoch}")[np.arange(40)]] += 1
    assert abs(((places - 50) ** 2 / 50).sum() - 39**2) < 5 * (2 * 39**2) ** 0.5


def test_the_memory_of_an_order_does_not_depend_on_the_rows():
    tracemalloc.start()
    sampler = Sampler(10**12, 64, seed=0)
    assert len(set(sampler.next_batch())) == 64
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(steps):
    whole = Sampler(10, 4, seed=3)
    for _ in range(steps):
        whole.next_batch()
    resumed = Sampler(10, 4, seed=3)
    resumed.load_state_dict(whole.state_dict())
    assert [resumed.next_batch() for _ in range(9)] == [whole.next_batch() for _ in range(9)]
    assert resumed.state_dict() == whole.state_dict()


def test_a_resume_may_change_the_batch_size_but_not_seed_or_data():
    state = Sampler(10, 4, seed=3).state_dict()
    Sampler(10, 8, seed=3).load_state_dict(state)
    with pytest.raises(ConfigError, match="seed = 4, but the checkpoint was made with seed = 3"):
        Sampler(10, 4, seed=4).load_state_dict(state)
    with pytest.raises(ConfigError, match="rows = 11, but the checkpoint was made with rows = 10"):
        Sampler(11, 4, seed=3).load_state_dict(state)
    del state["order"]
    with pytest.raises(
        ConfigError, match="in the order 'of version 0.1.0', this version's in 'feistel-1': finish the stage with"
    ):
        Sampler(10, 4, seed=3).load_state_dict(state)


def test_the_global_batch_is_the_same_for_any_number_of_ranks():
    batches = [Sampler(50, 8, seed=2).next_batch() for _ in range(2)]
    assert batches[0] == batches[1]
    for ranks in (1, 2, 4, 8):
        assert [index for rank in range(ranks) for index in shard(batches[0], rank, ranks)] == batches[0]
    assert shard([1, 2, 3, 4], 1, 2) == [3, 4]
    with pytest.raises(AssertionError, match="a global batch of 4 for 3"):
        shard([1, 2, 3, 4], 0, 3)


def test_no_rows_is_an_error():
    with pytest.raises(ConfigError, match="0 training rows: expected at least 1"):
        Sampler(0, 4, seed=0)
