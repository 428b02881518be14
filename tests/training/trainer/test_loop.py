"""Step boundaries: requests by signal that every rank obeys at the same step, and numbers that are
not finite."""

import json
import os
import signal

import pytest
import torch.distributed as dist

from tests.support.distributed import run
from training import sft
from training.checkpoint.stage_folder import StageFolder
from training.distributed.groups import StopRequest
from training.metrics.metrics import Metrics
from training.trainer.step import Learner


def ask_and_agree() -> list[tuple[bool, bool]]:
    """(stopping, saving) at four boundaries: nothing; USR2 on rank 1; after the save; TERM on rank
    0."""
    stop, seen = StopRequest(), []
    for rank, number in ((None, 0), (1, signal.SIGUSR2), (None, 0), (0, signal.SIGTERM)):
        if dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        stopping = stop.agreed()
        seen.append((stopping, stop.saving))
        stop.saved()
    return seen


def test_a_signal_to_one_rank_is_obeyed_by_all_at_the_same_step():
    assert run(ask_and_agree, 1, 1, 2) == [[(False, False), (False, True), (False, False), (True, False)]] * 2


def test_usr2_saves_and_goes_on(small_run, tmp_path, monkeypatch):
    """Sent while iteration 2 is logged: 3 is saved although save_every is 10, and the next row says
    how long that took."""
    log = Metrics.log

    def logged(self, iteration, *args, **values):
        log(self, iteration, *args, **values)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(Metrics, "log", logged)
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=5, save_every=10))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row.get("save_s")] == [4]
    assert StageFolder(tmp_path).latest() == 5


def train_to_nan(settings) -> str:
    with pytest.raises(FloatingPointError) as caught:
        sft.run(settings)
    return str(caught.value)


def test_weights_that_are_not_finite_are_never_saved(small_run, tmp_path, monkeypatch):
    """An overflow on one rank only, after a step whose loss and gradient were fine."""
    step = Learner.step

    def overflowing(self, *args):
        values = step(self, *args)
        if dist.get_rank() == 1:
            next(self.model.parameters()).data.view(-1)[0] = float("inf")
        return values

    monkeypatch.setattr(Learner, "step", overflowing)
    said = run(train_to_nan, 1, 1, 2, small_run.sft(tmp_path, iterations=3, save_every=1))
    assert said == ["iteration 1: weights of model are not finite; not saved"] * 2
    assert StageFolder(tmp_path).latest() is None and StageFolder(tmp_path).iterations() == []


def test_a_loss_that_is_not_finite_ends_every_rank_with_the_iteration(small_run, tmp_path):
    said = run(
        train_to_nan,
        1,
        2,
        1,
        small_run.sft(tmp_path, layout=(1, 2), iterations=3, save_every=1, lr=1e30, skip_updates=0),
    )
    assert said[0] == said[1] and said[0].startswith("iteration 2: not finite: {'loss': nan")
    assert StageFolder(tmp_path).latest() == 1


def test_wall_clock_and_memory_are_counted_over_attempts(small_run, tmp_path):
    for iterations in (2, 4):
        run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=iterations, schedule="constant", log_every=2))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["wall_seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[2] > seconds[1] > rows[0]["seconds"]
    assert ["peak_gb" in row for row in rows] == [False, True] * 2 and 0.1 < rows[-1]["peak_gb"] < 10
