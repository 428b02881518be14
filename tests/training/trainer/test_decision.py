"""What follows at a step's end, as a table: pure, without a model."""

from types import SimpleNamespace

import pytest

from training.trainer.decision import Decision, StepEnd, Stop, decide, evaluates, logs

CONFIG = SimpleNamespace(iterations=10, log_every=2, eval_every=3, save_every=4)
SAVED = "iteration 5 is saved"
PAUSED = f"paused by a health gate: kl = 9; {SAVED}, and resume goes on from it"


@pytest.mark.parametrize(
    ("end", "decision"),
    [
        (StepEnd(5), Decision(False, None, "")),
        (StepEnd(4), Decision(True, None, "")),
        (StepEnd(5, improved=True), Decision(True, None, "")),
        (StepEnd(5, save_requested=True), Decision(True, None, "")),
        (StepEnd(10), Decision(True, Stop.FINISHED, "the last iteration")),
        (StepEnd(5, out_of_patience=True), Decision(True, Stop.FINISHED, "no improvement")),
        (StepEnd(5, stop_requested=True), Decision(True, Stop.INTERRUPTED, f"stopped by a signal; {SAVED}")),
        (StepEnd(5, pause="kl = 9"), Decision(True, Stop.PAUSED, PAUSED)),
        # a signal would queue the stage again, and a pause waits for a person
        (StepEnd(5, stop_requested=True, pause="kl = 9"), Decision(True, Stop.PAUSED, PAUSED)),
        # nothing is left to pause or to interrupt
        (StepEnd(10, stop_requested=True, pause="kl = 9"), Decision(True, Stop.FINISHED, "the last iteration")),
        (StepEnd(5, out_of_patience=True, stop_requested=True), Decision(True, Stop.FINISHED, "no improvement")),
    ],
)
def test_what_follows_a_step(end, decision):
    assert decide(CONFIG, end) == decision


def test_logs_and_evaluations_are_due_at_multiples_and_at_the_last_iteration():
    iterations = range(1, 11)
    assert [number for number in iterations if logs(CONFIG, number)] == [2, 4, 6, 8, 10]
    assert [number for number in iterations if evaluates(CONFIG, number)] == [3, 6, 9, 10]
