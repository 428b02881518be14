"""Every example is in one row, rows are few, full and about equally long; each document is told
apart."""

import random

import pytest
import torch

from training.config import cost
from training.data import packing
from training.data.batches import Example, collate
from training.data.packing import RowLimits, collate_packed, lay_out, spread
from training.models.bloom.table import shape as bloom


@pytest.mark.parametrize("seed", range(20))
def test_every_example_once_in_rows_that_fit(seed):
    draw = random.Random(seed)
    pipeline = draw.choice([1, 2, 3])
    limits = RowLimits(
        draw.choice([64, 80, 2048]),
        draw.choice([1, 8, 24]),
        draw.choice([1, 2, 6]),
        draw.choice([1, 3, 8]),
        pipeline,
        draw.choice([1, pipeline]),
    )
    lengths = [draw.randint(1, limits.capacity) for _ in range(draw.randint(1, 100))]
    layout = lay_out(lengths, limits)
    assert sorted(index for row in layout.rows for index in row) == list(range(len(lengths)))
    assert layout.length % limits.multiple == 0
    assert max(sum(lengths[index] for index in row) for row in layout.rows) <= min(layout.length, limits.capacity)
    micro_batches, rest = divmod(len(layout.rows), limits.ranks * layout.micro_batch_size)
    assert rest == 0 and layout.micro_batch_size <= limits.micro_batch_size and micro_batches % limits.group == 0
    unit = limits.ranks * limits.group
    assert len(layout.rows) <= -(-len(lengths) // unit) * unit, "never more rows than without packing"
    assert lay_out(lengths, limits) == layout


def hh_lengths(draw: random.Random, number: int) -> list[int]:
    """Log-normal, with the median of 124 tokens, mean of 157 and longest of about 1,000 that HH's
    harmless test set has with a vocabulary of 4,096 (benchmarks/training/data.py measures them)."""
    return [min(2048, int(draw.lognormvariate(4.82, 0.7)) + 1) for _ in range(number)]


@pytest.mark.parametrize(("batch", "ranks", "least"), [(64, 1, 0.98), (128, 2, 0.98), (512, 8, 0.975)])
def test_rows_of_lengths_like_hh_are_full(batch, ranks, least):
    """The recipe's rows, on a GPU (multiples of 128), with its 64 examples a data-parallel rank.
    What is lost is that rows x length of the next size is 1 or 2% more: of many ranks the batches
    differ little in size, and this one lies badly."""
    draw = random.Random(0)
    computed = held = 0
    for _ in range(100):
        lengths = hh_lengths(draw, batch)
        layout = lay_out(lengths, RowLimits(2048, 128, ranks, 8))
        held, computed = held + sum(lengths), computed + len(layout.rows) * layout.length
    assert held / computed >= least


def test_a_pipeline_gets_more_and_smaller_micro_batches():
    """Eight full rows: all at once without a pipeline; one by one through four stages, where (8 +
    3) x 1 < (1 + 3) x 8."""
    for pipeline, size in ((1, 8), (4, 1)):
        assert lay_out([2048] * 8, RowLimits(2048, 128, 1, 8, pipeline)).micro_batch_size == size


def test_a_gpu_s_micro_batches_are_no_smaller_than_what_hides_their_launch():
    """64 full rows of 512 through two stages: one by one if only tokens count, else as many as are
    ``least`` tokens or allowed."""
    for budget, least, size in ((8, 0, 1), (8, 2048, 4), (8, 17400, 8), (32, 17400, 32), (64, 17400, 32)):
        assert lay_out([512] * 64, RowLimits(512, 128, 1, budget, 2, min_tokens=least)).micro_batch_size == size


def test_where_all_wait_for_their_launch_padding_is_still_saved():
    """Three rows of 60, not two of 120, though either is one micro-batch."""
    assert lay_out([60, 60, 60], RowLimits(128, 4, 1, 8, min_tokens=5000)) == ([[0], [1], [2]], 60, 3)


def test_what_a_gpu_computes_while_the_host_launches():
    """By hand: 12 h^2 multiplications a token and layer, 6 FLOP each for forward and backward, and
    half of the attention's square."""
    small, large = (bloom(24, hidden, hidden // 128, 250880, 1e-5) for hidden in (2048, 4096))
    assert cost.launched_tokens(small, 2, 512, 989) == int(
        0.0047 * 0.553 * 989e12 * 2 / (72 * 2048**2 + 6 * 2048 * 512)
    )
    found = [cost.launched_tokens(shape, tensor, 2048, 989) for shape in (large, small) for tensor in (1, 2)]
    assert found == pytest.approx([1342, 4351, 4848, 15714], abs=1)


def test_exchanges_find_rows_that_longest_first_does_not():
    """LPT makes 6 + 3 and 4 + 4 + 3: 9 and 11."""
    assert sorted(map(sorted, spread([6, 4, 4, 3, 3], 2, 11))) == [[0, 3], [1, 2, 4]]
    assert sorted(map(sorted, spread([6, 4, 4, 3, 3], 2, 10))) == [[0, 1], [2, 3, 4]]
    assert spread([6, 4, 4, 3, 3], 2, 9) is None


def test_an_example_longer_than_a_row_is_our_fault():
    with pytest.raises(AssertionError, match="an example of 9 tokens in rows of 8"):
        lay_out([9], RowLimits(8, 1, 1, 1))


def test_a_packed_row_holds_the_same_ids_and_the_same_predicted_tokens():
    examples = [Example([5, 6, 7], 1), Example([8, 9], 0), Example([4, 3, 2, 1], 3)]
    packed = collate_packed([[examples[0], examples[1]], [examples[2]], []], 0, 6)
    assert packed["tokens"].tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 2, 1, 0, 0], [0] * 6]
    assert packed["documents"].tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1], [0] * 6]
    assert packed["response_mask"].int().tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    alone = collate(examples, 0, 6)
    assert packed["response_mask"].sum() == alone["response_mask"].sum()
    assert torch.equal(packed["tokens"][packed["response_mask"]], alone["tokens"][alone["response_mask"]])


def test_rows_that_can_t_hold_the_examples_are_not_tried(monkeypatch):
    """256 examples a little longer than half a row, then than a third: most numbers of rows are too
    few, and a trial takes milliseconds."""
    tried, spread = [], packing.spread
    monkeypatch.setattr(packing, "spread", lambda *args: tried.append(args[1]) or spread(*args))
    for length, rows in ((1025, 256), (683, 128)):
        tried.clear()
        assert len(lay_out([length] * 256, RowLimits(2048, 128, 1, 8)).rows) == rows
        assert len(tried) <= 10
