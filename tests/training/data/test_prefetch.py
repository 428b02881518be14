"""Batches made ahead: the same ones in the same order, each with the sampler's state of its own
step, and no waiting for them."""

from __future__ import annotations

import threading

import pytest
import torch

from training.data.batches import Sampler
from training.data.prefetch import prefetched


def batch(indices: list[int]):
    return [{"tokens": torch.tensor(indices)}], {"tokens": len(indices)}


def test_batches_and_states_are_those_of_their_step():
    ahead, alone = Sampler(10, 4, seed=3), Sampler(10, 4, seed=3)
    for micro_batches, said, state in prefetched(ahead, batch, 7):
        assert micro_batches[0]["tokens"].tolist() == alone.next_batch() and said == {"tokens": 4}
        assert state == alone.state_dict()
        resumed = Sampler(10, 4, seed=3)
        resumed.load_state_dict(state)
        assert (
            resumed.next_batch()
            == (goes_on := Sampler(10, 4, seed=3), goes_on.load_state_dict(alone.state_dict()))[0].next_batch()
        )
    assert ahead.state_dict() == alone.state_dict()  # not one batch more than was asked for


def test_the_next_batch_is_made_while_this_one_is_in_use():
    """And only that one: memory holds two."""
    made, taken = threading.Semaphore(0), []

    def make(indices):
        taken.append(indices)
        made.release()
        return batch(indices)

    batches = prefetched(Sampler(100, 4, seed=0), make, 5)
    for step in range(5):
        next(batches)
        for _ in range(2 if step == 0 else 1 if step < 4 else 0):
            assert made.acquire(timeout=30), "no one asked for it, and it is made"
        assert len(taken) == min(step + 2, 5)


def test_an_error_is_raised_where_the_batch_is_asked_for_and_the_thread_ends():
    def second_fails(indices, made=[]):  # noqa: B006 - counts its calls
        made.append(indices)
        if len(made) == 2:
            raise ValueError("row 7 is no row")
        return batch(indices)

    batches = prefetched(Sampler(100, 4, seed=0), second_fails, 3)
    next(batches)
    with pytest.raises(ValueError, match="row 7 is no row"):
        next(batches)
    left = prefetched(Sampler(100, 4, seed=0), batch, 3)
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]
