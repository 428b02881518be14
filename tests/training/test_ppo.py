"""PPO's invariants on the real trainer: exact where they are exact, equal to rounding over
layouts."""

import contextlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator

from tests.support.distributed import run
from training import ppo
from training.config.schema import build
from training.config.trainers import PPOConfig
from training.data.batches import Example, collate
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError
from training.rl import experience, invariants, reward_bias
from training.rl.minibatches import plan
from training.trainer.step import split


def rows(stage):
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tokens", [0, 100])
def test_at_the_first_iteration_policy_is_reference_and_ratio_is_one(small_run, tmp_path, tokens):
    """One minibatch an iteration: KL 0, approx KL 0, clip fraction 0, |policy loss| ~ 0 with
    whitened advantages; in packed rows, too."""
    run(
        ppo.run,
        1,
        2,
        1,
        small_run.ppo(tmp_path, layout=(1, 2), iterations=1, global_batch_size=16, micro_batch_tokens=tokens),
    )
    (first,) = rows(tmp_path)
    assert first["kl"] == 0 and first["kl_k3"] == 0
    assert first["clip_fraction"] == 0 and first["approx_kl"] == 0
    assert abs(first["policy_loss"]) < 1e-6
    assert 0 < first["entropy"] < math.log(512) and first["policy_loss"] != first["value_loss"]


@pytest.fixture(scope="module")
def reference_rows(small_run, tmp_path_factory):
    stage = tmp_path_factory.mktemp("reference")
    run(ppo.run, 1, 1, 1, small_run.ppo(stage, iterations=2))
    return rows(stage)


PHASES = [
    f"{what}_{phase}"
    for what in ("seconds", "tokens_per_second", "peak_gb")
    for phase in ("generate", "score", "update")
]
REPORTED = [
    "reward",
    "reward_std",
    "kl",
    "kl_k3",
    "entropy",
    "clip_fraction",
    "approx_kl",
    "explained_variance",
    "eos_rate",
    "response_length",
    "repeated_ngrams",
    "reward_length_correlation",
    "logprob_error",
    "logprob_error_max",
    "token_mult_prob_error",
    "policy_loss",
    "value_loss",
    "grad_norm",
    "value_grad_norm",
    "lr",
    "value_lr",
    "kl_coef",
    "skipped_updates",
    "gates_breached",
    "packing_efficiency",
    "tokens_per_second",
    "wall_seconds",
    *PHASES,
]


def test_every_iteration_reports_to_both_files(small_run, tmp_path):
    """metrics.jsonl and TensorBoard, the same numbers; memory in GB of 1e9 bytes, of this process.
    And the replies that are kept."""
    config = small_run.ppo(tmp_path, iterations=2, eval_every=1, keep_replies=True)
    run(ppo.run, 1, 1, 1, config)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for row in rows(tmp_path):
        for name in REPORTED:
            shown = {event.step: event.value for event in events.Scalars(name)}
            assert math.isfinite(row[name]) and shown[row["iteration"]] == pytest.approx(row[name], rel=1e-5), name
        assert all(row[name] > 0 for name in PHASES) and 0.05 < row["peak_gb_update"] < 10
        assert row["wall_seconds"] > sum(row[name] for name in PHASES[:3])
    kept, words = [json.loads(line) for line in (tmp_path / "replies.jsonl").open()], Tokenizer(config.paths.model)
    prompts = len(Path(config.paths.heldout).read_text().splitlines())
    assert [(row["iteration"], row["index"]) for row in kept] == [
        (at, index) for at in (1, 2) for index in range(prompts)
    ]
    assert all(
        row["response"] == words.decode(row["tokens"]) and row["ended"] == (row["tokens"][-1] == words.eos_id)
        for row in kept
    )
    for row in rows(tmp_path):
        mine = [one["ended"] for one in kept if one["iteration"] == row["iteration"]]
        assert sum(mine) / len(mine) == pytest.approx(row["heldout_eos_rate"])


SEQUENCE, PACKED, PARKED = {"sequence_parallel": True}, {"micro_batch_tokens": 100}, {"offload": "all"}
ALONE = {"generation_tensor_parallel": 1}


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ((2, 1, 1), {}),
        ((1, 2, 1), {}),
        ((1, 1, 2), PARKED),
        ((1, 2, 2), {}),
        ((1, 2, 2), PACKED),
        ((2, 1, 1), SEQUENCE | ALONE),
        ((2, 2, 1), SEQUENCE | PACKED),
    ],
)
def test_every_layout_gives_the_same_numbers(small_run, reference_rows, tmp_path, layout, values):
    """Two iterations of two minibatches: samples, rewards, KL, losses and gradient norms equal
    those of one rank, padded."""
    run(ppo.run, *layout, small_run.ppo(tmp_path, layout=layout[:2], iterations=2, **values))
    for ours, expected in zip(rows(tmp_path), reference_rows, strict=True):
        for name in ("response_length", "eos_rate", "repeated_ngrams"):
            assert ours[name] == expected[name], name  # the samples themselves
        for name in (
            "reward",
            "kl",
            "policy_loss",
            "value_loss",
            "entropy",
            "explained_variance",
            "grad_norm",
            "value_grad_norm",
            "lr",
        ):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize("offload", ["frozen", "all"])
def test_offloading_changes_no_bit(small_run, reference_rows, tmp_path, offload):
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path, iterations=2, offload=offload))
    measured = ("time", "seconds", "tokens_per_second", "peak_gb", "rollout", "save_")
    for ours, expected in zip(rows(tmp_path), reference_rows, strict=True):
        names = [name for name in expected if not any(word in name for word in measured)]
        assert len(names) > 25 and {name: ours[name] for name in names} == {name: expected[name] for name in names}


def test_micro_batch_size_does_not_change_the_numbers(small_run, reference_rows, tmp_path):
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path, iterations=2, micro_batch_size=8, generation_batch_size=5))
    for ours, expected in zip(rows(tmp_path), reference_rows, strict=True):
        for name in ("policy_loss", "value_loss", "grad_norm", "kl"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=2e-5), name


def test_the_sft_model_s_responses_score_zero_on_average(small_run, tmp_path):
    """The bias of the reward model's checkpoint, from other prompts and draws than these 64: within
    three standard errors."""
    run(
        ppo.run,
        1,
        1,
        1,
        small_run.ppo(tmp_path, iterations=1, response_length=20, rollout_batch_size=64, missing_eos_penalty=0.0),
    )
    (row,) = rows(tmp_path)
    assert abs(row["reward"]) < 3 * row["reward_std"] / 64**0.5, row


def with_another_zero(config: PPOConfig, shift: float) -> list[dict[str, float]]:
    """Two iterations with ``shift`` taken off the reward model's head and added to its stored
    bias."""
    load = ppo.load_models

    def shifted(*arguments):
        models = load(*arguments)
        with torch.no_grad():
            for model in (models.reward, models.value):
                next(p for name, p in model.named_parameters() if name.endswith("linear.bias") and p.numel() == 1).sub_(
                    shift
                )
        return models

    ppo.load_models = shifted  # in this rank's process
    trainer = ppo.PPO(config)
    trainer.reward_bias += shift
    return [trainer.iterate(iteration) for iteration in (1, 2)]


def test_the_reward_model_s_zero_is_arbitrary(small_run, tmp_path):
    """A ranking loss can't tell r from r + c, so nothing of PPO may depend on c: scores, returns
    and values share one zero."""
    config = small_run.ppo(tmp_path, response_length=16, value_clip=0.05)
    ours, shifted = (run(with_another_zero, 1, 1, 1, config, shift)[0] for shift in (0.0, 1.5))
    for expected, row in zip(ours, shifted, strict=True):
        for name in expected.keys() & {
            "reward",
            "kl",
            "value_loss",
            "value_offset",
            "value_offset_last",
            "explained_variance",
            "value_grad_norm",
            "policy_loss",
            "grad_norm",
            "entropy",
            "clip_fraction",
        }:
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=2e-4), name
    assert abs(ours[0]["value_offset"]) < ours[0]["reward_std"], (
        "the first iteration's values are not off by a constant"
    )


def test_a_reward_model_without_a_bias_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(
        ConfigError, match="holds no reward_bias: it was made by an earlier version; train the reward model again"
    ):
        reward_bias.stored(tmp_path)


def test_the_adaptive_coefficient_waits_for_the_policy(small_run, tmp_path):
    """While only the value model learns the KL is 0 by construction and must not lower the
    coefficient."""
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path, iterations=3, value_warmup=2, kl_target=1.0, kl_horizon=100))
    assert [row["kl_coef"] for row in rows(tmp_path)] == [0.02] * 3


def one_step(config: PPOConfig, length: int):
    """Loss of one policy and value step on fixed experience, padded to ``length``."""
    trainer = ppo.PPO(config)
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(torch.randint(4, 500, (size,), generator=generator).tolist(), size // 2)
        for size in (9, 12, 7, 15, 11, 9, 16, 13)
    ]
    batch = collate(examples, trainer.tokenizer.pad_id, length)
    rollout = experience.Rollout(batch, torch.tensor([True] * 7 + [False]), torch.zeros(batch["tokens"].shape))
    division = plan(config, trainer.shape, batch["lengths"].tolist(), config.global_batch_size)
    scored = experience.score(config, trainer.models, batch, division)
    samples = trainer.learn_from(rollout, scored)
    assert samples.batch["advantages"][batch["response_mask"]].mean().abs() < 1e-6
    assert (
        not samples.batch["advantages"][~batch["response_mask"]].any()
        and not samples.batch["returns"][~batch["response_mask"]].any()
    )
    steps = trainer.update(samples.batch, [division], learn_policy=True)
    return {**samples.metrics, **ppo.summary(steps)}


def test_a_row_s_loss_does_not_depend_on_its_batch_s_padding(small_run, tmp_path):
    settings = small_run.ppo(tmp_path, rollout_batch_size=8, global_batch_size=8, micro_batch_size=4)
    short, wide = (run(one_step, 1, 1, 1, settings, length)[0] for length in (16, 40))
    for name, value in short.items():
        assert wide[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_cut_prompts_are_counted_and_keep_their_cue(small_run, tmp_path, capfd):
    with pytest.raises(
        AssertionError, match=r"ConfigError: prompt_length = 1: .* the assistant's mark, has 2 with BOS"
    ):
        run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "short", prompt_length=1))
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "cut", prompt_length=12, response_length=4, iterations=1))
    assert re.search(r"2,\d+ of 3,000 rows are longer than prompt_length = 12 and are cut", capfd.readouterr().out)


def test_response_without_eos_gets_the_penalty_instead_of_the_score(small_run, tmp_path):
    def scores(config):
        tokens = collate([Example([5, 6, 7, 2], 2), Example([5, 6, 7, 8], 2)], 3, 8)
        scored = experience.Scored(*(torch.zeros(2, 8) for _ in range(3)), torch.tensor([4.0, 4.0]))
        rollout = experience.Rollout(tokens, torch.tensor([True, False]), scored.logprobs)
        made = experience.experience(config, rollout, scored, kl_coef=0.0, reward_bias=1.0, value_bias=0.0)
        return made.metrics["reward"], made.batch["returns"]

    reward, returns = run(scores, 1, 1, 1, small_run.ppo(tmp_path, gamma=1.0, lam=1.0))[0]
    assert reward == pytest.approx((5.0 - 1.0) / 2)
    assert returns[:, 2:4].tolist() == [[5.0, 5.0], [-1.0, -1.0]]


def parked_weights(config) -> list[bool]:
    """Of the reference: while idle its weights have no memory on the device, at work they are the
    policy's, then none again."""
    trainer, seen = ppo.PPO(config), []
    for expected in (trainer.models.policy, trainer.models.policy):
        seen.append(
            not any(weight.untyped_storage().nbytes() for weight in trainer.models.reference.model.parameters())
        )
        with trainer.models.reference as model:
            seen.append(all(map(torch.equal, model.parameters(), expected.parameters())))
    return seen


def test_frozen_models_wait_in_host_memory(small_run, tmp_path):
    """That the numbers are the same, test_offloading_changes_no_bit shows."""
    assert run(parked_weights, 1, 1, 1, small_run.ppo(tmp_path, offload="frozen")) == [[True] * 4]


@pytest.mark.parametrize(("tokens", "refused"), [(4, False), (400, True)])
def test_few_samples_say_nothing_about_the_policy_they_came_from(small_run, tmp_path, tokens, refused):
    """Surprisals of 2 to 2.2 nats where the entropy is 4: luck of 4 tokens, but not of 400."""
    mask, surprisal = torch.ones(1, tokens, dtype=torch.bool), torch.tensor([2.0, 2.2]).repeat(tokens // 2)[None]
    batch = {"response_mask": mask, "advantages": torch.zeros(1, tokens), "old_logprobs": -surprisal}
    step = {"skipped_updates": 0, "approx_kl": 0.0, "clip_fraction": 0.0, "policy_loss": 0.0, "entropy": 4.0}
    with pytest.raises(AssertionError, match="not drawn from this policy") if refused else contextlib.nullcontext():
        invariants.first_update(small_run.ppo(tmp_path), step, batch)


def test_value_warm_up_leaves_the_policy_alone(small_run, tmp_path):
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path, iterations=2, value_warmup=1))
    first, second = rows(tmp_path)
    assert "policy_loss" not in first and "policy_loss" in second
    assert second["kl"] == 0  # sampled before the policy's first step


def test_repeated_ngrams_by_hand():
    assert experience.repeated_ngrams([1, 2, 3, 1, 2, 3]) == pytest.approx(0.25)
    assert experience.repeated_ngrams([1, 2]) == 0


def test_split_fills_up_with_copies_of_the_last_row():
    parts = split({"tokens": torch.arange(5)[:, None]}, 2)
    assert [part["tokens"].flatten().tolist() for part in parts] == [[0, 1], [2, 3], [4, 4]]


def test_contradictions_are_errors_that_say_what_to_change(small_run, tmp_path):
    good = small_run.ppo(tmp_path)
    with pytest.raises(
        ValueError,
        match="6 ranks can't be divided into tensor_parallel 2 x pipeline_parallel 2 = 4; use a multiple of 4",
    ):
        small_run.ppo(tmp_path, layout=(2, 2)).data_parallel(6)
    with pytest.raises(ConfigError, match="rlhf.kl_coeff: no such key; did you mean rlhf.kl_coef"):
        build(PPOConfig, {"kl_coeff": 0.1}, "rlhf")
    with pytest.raises(ValueError, match="rollout_batch_size = 12 is not a multiple of global_batch_size = 8"):
        small_run.ppo(tmp_path, rollout_batch_size=12)
    for change, message in (
        ({"prompt_length": 0}, "prompt_length = 0: expected at least 1"),
        ({"top_p": 0.9}, "top_p = 0.9: .* set top_p = 1.0, or lower temperature"),
        ({"top_k": 50}, "set top_k = 0"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0: expected 0 .off. or more than 1"),
        ({"lam": 1.5}, "lam = 1.5"),
        ({"generation_tensor_parallel": 2}, "generation_tensor_parallel = 2 does not divide .* = 1"),
        ({"cache_share": 0}, "cache_share = 0"),
        ({"min_lr": 1.0}, "min_lr = 1.0: expected at most lr"),
        ({"lr": 1.0, "min_lr": 0.5}, "min_lr = 0.5: expected at most value_lr"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"warmup_iterations": -5}, "warmup_iterations = -5"),
        ({"value_warmup": -1}, "value_warmup = -1"),
        ({"kl_coef": float("nan")}, "kl_coef = nan"),
        ({"kl_target": -3.0}, "kl_target = -3.0"),
        ({"kl_target": 6.0, "kl_horizon": 5}, "kl_horizon = 5: .* negative"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_coef = 0 .* start value"),
        ({"missing_eos_penalty": float("nan")}, "missing_eos_penalty = nan"),
        ({"clip_ratio": 1.5}, "clip_ratio = 1.5: expected below 1"),
        ({"entropy_min": math.nan}, "entropy_min = nan"),
        ({"explained_variance_min": math.nan}, "explained_variance_min = nan: expected a number"),
        ({"offload": "host"}, "offload = 'host': expected one of none, frozen, all"),
        ({"offload": "all", "async_save": True}, 'async_save = true reads .* offload = "all" moves them'),
        ({"value_warmup": 5}, "value_warmup = 5: expected fewer together than iterations = 2"),
    ):
        with pytest.raises(ValueError, match=message):
            small_run.ppo(tmp_path, **change)
    assert good.updates == 2
