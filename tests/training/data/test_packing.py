"""Every example is in one row, rows are few, full and about equally long; each document is told apart."""

import random

import pytest
import torch

from training.data.batches import Example, collate
from training.data.packing import collate_packed, pack


@pytest.mark.parametrize("seed", range(20))
def test_every_example_once_in_few_rows_of_a_multiple(seed):
    draw = random.Random(seed)
    capacity, unit = draw.choice([64, 80, 2048]), draw.choice([1, 2, 6])
    lengths = [draw.randint(1, capacity) for _ in range(draw.randint(1, 100))]
    rows = pack(lengths, capacity, unit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert len(rows) % unit == 0
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= capacity
    assert len(rows) <= -(-len(lengths) // unit) * unit, "never more rows than without packing"
    assert pack(lengths, capacity, unit) == rows


def test_rows_of_lengths_like_hh_are_full():
    """Log-normal lengths with HH's median of about 150 tokens and its long tail, 128 to a batch: at most 3% of padding."""
    draw = random.Random(0)
    for unit in (2, 8):
        lengths = [min(2048, 20 + int(draw.lognormvariate(4.9, 0.7))) for _ in range(128)]
        rows = pack(lengths, 2048, unit)
        longest = max(sum(lengths[index] for index in row) for row in rows)
        assert sum(lengths) / (len(rows) * longest) > 0.97


def test_an_example_longer_than_a_row_is_our_fault():
    with pytest.raises(AssertionError, match="an example of 9 tokens in rows of 8"):
        pack([9], 8, 1)


def test_a_packed_row_holds_the_same_ids_and_the_same_predicted_tokens():
    examples = [Example([5, 6, 7], 1), Example([8, 9], 0), Example([4, 3, 2, 1], 3)]
    packed = collate_packed([[examples[0], examples[1]], [examples[2]], []], 0, 6)
    assert packed["tokens"].tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 2, 1, 0, 0], [0] * 6]
    assert packed["documents"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1], [0] * 6]
    assert packed["response_mask"].int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    alone = collate(examples, 0, 6)
    assert packed["response_mask"].sum() == alone["response_mask"].sum()
    assert torch.equal(packed["tokens"][packed["response_mask"]], alone["tokens"][alone["response_mask"]])
