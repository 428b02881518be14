"""Faults that have spoilt others' PPO runs, put into the real trainer: each is caught by the check
that training/rl/health_gates.py's table names."""

import re
from dataclasses import replace

import pytest
import torch

from tests.support.distributed import run
from training import ppo
from training.rl import experience


def shifted_mask(monkeypatch, trainer):
    collate = experience.collate

    def shifted(*args):
        batch = collate(*args)
        return batch | {"response_mask": batch["response_mask"].roll(-1, 1)}

    monkeypatch.setattr(experience, "collate", shifted)


def rollout_temperature(monkeypatch, trainer):
    sampling = experience.Sampling
    monkeypatch.setattr(experience, "Sampling", lambda tokens, temperature: sampling(tokens, 2 * temperature))


def update_temperature(monkeypatch, trainer):
    objective = ppo.policy_objective
    monkeypatch.setattr(ppo, "policy_objective", lambda config: objective(replace(config, temperature=1.2)))


def dropout(monkeypatch, trainer):
    for module in trainer.policy.model.modules():
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.1


def stale_reference(monkeypatch, trainer):
    with torch.no_grad():
        next(trainer.models.reference.parameters()).mul_(1.05)


def moving_reference(monkeypatch, trainer):
    trainer.models = replace(trainer.models, reference=trainer.models.policy)


FAULTS = {
    shifted_mask: "sample 0: the response is tokens [0-9]+ to [0-9]+, but response_mask is True from",
    rollout_temperature: "not drawn from this policy .another temperature",
    update_temperature: "first minibatch: approx KL .* expected 0, 0 and",
    dropout: "first minibatch: approx KL .* expected 0, 0 and",
    stale_reference: "iteration 1: KL to the reference = .* expected 0",
}


def iterations(config, fault) -> tuple[str, list[str]]:
    """Two iterations of the trainer with the fault -> what it died of, and the gates' warnings."""
    trainer, warnings = ppo.PPO(config), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        if fault:
            fault(monkeypatch, trainer)
        try:
            for iteration in (1, 2):
                warnings += trainer.gates.judge(iteration, trainer.iterate(iteration))[0]
        except AssertionError as error:
            return str(error), warnings
    return "", warnings


@pytest.mark.parametrize(
    "fault", [None, *FAULTS, moving_reference], ids=lambda fault: fault.__name__ if fault else "none"
)
def test_a_fault_is_caught_in_the_first_iterations(small_run, tmp_path, fault):
    """Without a fault nothing is said. The log's message names what is wrong."""
    config = small_run.ppo(tmp_path, response_length=16, global_batch_size=16, gate_after=0)
    ((died, warnings),) = run(iterations, 1, 1, 1, config, fault)
    if fault in FAULTS:
        assert re.search(FAULTS[fault], died), died
    else:
        expected = ["the KL to the reference is exactly 0"] if fault else []
        assert died == "" and [text.split(":")[0] for text in warnings] == expected
