"""Whole PPO iterations of ours beside a reimplementation that shares none of its parts."""

import json

import pytest

from tests.support.distributed import run
from tests.support.ppo_reference import Reference
from tests.support.ppo_weights import weights
from training import ppo


@pytest.mark.parametrize("family", ["bloom", "llama", "qwen2", "qwen3"])
def test_two_iterations_equal_plain_torch_with_hugging_face(family_run, tmp_path, family):
    """Samples exactly; rewards, KL, losses, norms and entropy to 1e-5 in the first iteration and,
    after eight updates of each model (two epochs of two minibatches), to 2e-4 in the second: it
    sees every sign, mask, shift, denominator, moment and rate."""
    settings = dict(
        iterations=2,
        epochs=2,
        kl_coef=0.1,
        response_length=16,
        temperature=0.8,
        value_clip=0.02,
        clip_ratio=0.05,
        dual_clip=1.02,
        entropy_coef=0.02,
    )
    made = family_run(family)
    config = made.ppo(tmp_path, **settings)
    run(ppo.run, 1, 2, 1, made.ppo(tmp_path, layout=(1, 2), micro_batch_tokens=150, **settings))
    ours = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    sft, _ = run(weights, 1, 1, 1, config, config.paths.init, "lm")[0]
    reward, head = run(weights, 1, 1, 1, config, config.paths.reward, "scalar")[0]
    reference = Reference(config, sft, reward, head)
    for iteration, tolerance in ((1, 1e-5), (2, 2e-4)):
        expected = reference.iterate(iteration)
        assert expected["eos_rate"] > 0 and expected["value_loss"] > 0
        for name, value in expected.items():
            assert ours[iteration - 1][name] == pytest.approx(value, rel=tolerance, abs=tolerance * 0.1), (
                iteration,
                name,
            )
    assert expected["kl"] > 0.01 and expected["clip_fraction"] > 0, "the second iteration's policy has moved"
