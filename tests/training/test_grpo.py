"""GRPO beside plain torch on Hugging Face's models, over layouts and modes."""

import json
import statistics

import pytest
import torch

from tests.support.distributed import run
from tests.support.ppo_reference import Reference, Row
from tests.support.ppo_weights import weights
from training import grpo
from training.config.schema import build
from training.config.trainers import GRPOConfig
from training.errors import ConfigError


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


class GroupReference(Reference):
    """PPO's reference with the two parts that GRPO has of its own."""

    def judged(self, rows: list[Row]) -> dict[str, float]:
        config, means, spreads = self.config, self.scored(rows), []
        for first in range(0, len(rows), config.group_size):
            group = rows[first : first + config.group_size]
            scores = [
                row.score
                - (config.kl_coef * (row.logprobs - row.reference).sum().item() if config.kl_in == "reward" else 0.0)
                for row in group
            ]
            spreads.append(statistics.stdev(scores))
            for row, score in zip(group, scores, strict=True):
                above = score - statistics.mean(scores)
                row.advantages = torch.full(
                    (len(row.logprobs),), above / (spreads[-1] + 1e-4) if config.scale_advantages else above
                )
        return {**means, "group_std": statistics.mean(spreads)}

    def update(self, rows: list[Row], total: int) -> dict[str, float]:
        config, count = self.config, sum(len(row.logprobs) for row in rows)
        self.steps += 1
        loss = penalty = entropy = clipped = 0.0
        for row in rows:
            odds = self.logits(self.policy, row).log_softmax(-1)
            now = odds[torch.arange(len(row.logprobs)), torch.tensor(row.tokens[row.start :])]
            ratio = (now - row.logprobs).exp()
            near = ratio.clamp(1 - config.clip_ratio, 1 + config.clip_ratio_high)
            loss = loss - torch.minimum(ratio * row.advantages, near * row.advantages).sum() / count
            away = row.reference - now
            penalty = penalty + config.kl_coef * (away.exp() - away - 1).sum() / count
            clipped += (near * row.advantages < ratio * row.advantages).sum().item() / count
            entropy += -(odds.exp() * odds).sum().item() / count
        norm = self.step("policy", self.policy, loss + penalty if config.kl_in == "loss" else loss, config.lr, total)
        return {"policy_loss": loss.item(), "entropy": entropy, "clip_fraction": clipped, "grad_norm": norm}


@pytest.mark.parametrize(
    ("family", "layout", "values"),
    [
        ("bloom", (1, 2, 1), {"kl_coef": 0.5, "micro_batch_tokens": 150}),
        ("bloom", (2, 1, 2), {"kl_coef": 0.5, "kl_in": "reward", "scale_advantages": False}),
        ("qwen2", (1, 2, 1), {"kl_coef": 0.5, "micro_batch_tokens": 150}),
        ("qwen3", (2, 1, 2), {"kl_coef": 0.5, "kl_in": "reward", "scale_advantages": False}),
    ],
)
def test_two_iterations_equal_plain_torch_with_hugging_face(family_run, tmp_path, family, layout, values):
    """Samples exactly; the rest to 1e-5 in the first iteration and, after four updates, to 2e-4 in
    the second."""
    settings = dict(iterations=2, epochs=2, response_length=16, clip_ratio=0.05, clip_ratio_high=0.08, **values)
    config = family_run(family).grpo(tmp_path, **settings)
    run(grpo.run, *layout, family_run(family).grpo(tmp_path, layout=layout[:2], **settings))
    sft, _ = run(weights, 1, 1, 1, config, config.paths.init, "lm")[0]
    reward, head = run(weights, 1, 1, 1, config, config.paths.reward, "scalar")[0]
    reference = GroupReference(config, sft, reward, head)
    for ours, tolerance, iteration in zip(rows(tmp_path), (1e-5, 2e-4), (1, 2), strict=True):
        for name, value in reference.iterate(iteration).items():
            assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance * 0.2), (iteration, name)
    assert abs(ours["kl"]) > 0.01 and ours["clip_fraction"] > 0 and ours["group_std"] > 0, (
        "the second iteration's policy has moved"
    )
    assert "value_loss" not in ours and "explained_variance" not in ours


def test_adapters_learn_and_no_value_model_is_kept(small_run, tmp_path):
    """The checkpoint holds the policy alone; before its adapters learn it is its own reference."""
    run(grpo.run, 1, 1, 1, small_run.grpo(tmp_path, iterations=3, lora_rank=4, lr=1e-2, offload="all"))
    made = rows(tmp_path)
    assert made[0]["kl"] == 0 and made[2]["kl_k3"] > 1e-4
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "iter_0000003").iterdir()) == [
        "SHA256",
        "policy",
        "state.json",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 1}, "grpo.group_size = 1: expected at least 2"),
        ({"kl_in": "score"}, "expected one of loss, reward"),
        ({"group_size": 3}, "grpo.rollout_batch_size = 1024 is not a multiple of group_size = 3"),
        ({"value_lr": 1e-5}, "grpo.value_lr: no such key"),
        ({"gamma": 0.9}, "grpo.gamma: no such key"),
    ],
)
def test_bad_values_say_what_was_expected(values, message):
    paths = dict.fromkeys(("output", "model", "init", "train", "heldout", "reward"), "")
    with pytest.raises(ConfigError, match=message):
        build(GRPOConfig, {"paths": paths, **values}, "grpo")
