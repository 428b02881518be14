"""The rollout engine's log-probabilities beside the training forward's, inside the trainers; and
importance weights made of both."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.support.distributed import run
from tests.training.conftest import Run
from training import grpo, losses, ppo, reward


def rows(stage):
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


BOUNDS = {"fp32": (2e-4, 1 + 1e-5), "bf16": (0.5, 1.03)}
"""Largest |difference| in nats, and token_mult_prob_error. bf16: the layers of both round, the
logits of neither."""


@pytest.mark.parametrize(
    ("family", "precision", "layout", "values"),
    [
        ("bloom", "fp32", (2, 1), {"generation_tensor_parallel": 1, "temperature": 0.7}),
        ("bloom", "bf16", (2, 1), {}),
        ("qwen3", "fp32", (2, 1), {"micro_batch_tokens": 100}),
        ("llama", "bf16", (1, 1), {"temperature": 0.7}),
    ],
)
def test_rollout_and_training_agree(family_run, tmp_path, family, precision, layout, values):
    """In both iterations, so also after an update of the weights; greedy decoding's are another
    distribution's, which is not asked."""
    prepared = family_run(family)
    config = prepared.ppo(tmp_path, layout=layout, iterations=2, precision=precision, **values)
    run(ppo.run, *layout, 1, config)
    largest, mean_of_exp = BOUNDS[precision]
    for row in rows(tmp_path):
        assert row["logprob_error"] <= row["logprob_error_max"] <= largest, row
        assert 1 + row["logprob_error"] <= row["token_mult_prob_error"] <= mean_of_exp, row


def test_rollout_and_training_leave_out_the_embedding_s_rows_beyond_the_tokenizer(family_run, tmp_path):
    """Qwen's embeddings have hundreds of rows without a token. Here 40 have large weights: counted
    by one of the two alone they would show in every log-probability."""
    source, wide = family_run("qwen2"), Run(tmp_path)
    shutil.copytree(source.folder / "data", wide.folder / "data")
    shutil.copytree(source.model, wide.model)
    model = AutoModelForCausalLM.from_pretrained(wide.model)
    tokens = model.config.vocab_size
    model.resize_token_embeddings(tokens + 40, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens:] *= 20
    model.save_pretrained(wide.model)
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(wide.folder / "convert"), wide.model)))
    (wide.folder / "sft").symlink_to("convert")
    run(reward.run, 1, 1, 1, wide.reward(wide.folder / "reward", iterations=1))
    run(ppo.run, 2, 1, 1, wide.ppo(tmp_path / "ppo", layout=(2, 1), iterations=2))
    for row in rows(tmp_path / "ppo"):
        assert row["logprob_error_max"] <= BOUNDS["fp32"][0], row
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    assert logits[tokens:].sum() > 0.1


def test_the_engine_s_log_probabilities_stay_with_their_samples(small_run, tmp_path):
    """Over data-parallel ranks, with groups and replicas: each number at its token."""
    run(grpo.run, 1, 1, 2, small_run.grpo(tmp_path, iterations=1))
    (row,) = rows(tmp_path)
    assert 0 < row["logprob_error_max"] < 2e-4


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_a_cap_below_1_weighs_every_token_by_it(small_run, tmp_path, trainer):
    """In fp32 the ratio of training to rollout is 1, so that every weight is the cap: loss and
    gradient of the first step are half."""
    halves = []
    for cap in (0.0, 0.5):
        stage = tmp_path / str(cap)
        values = {"kl_coef": 0.02, "kl_in": "reward"} if trainer == "grpo" else {}
        config = getattr(small_run, trainer)(
            stage, iterations=1, global_batch_size=16, importance_cap=cap, clip_grad=1e9, **values
        )
        run({"ppo": ppo, "grpo": grpo}[trainer].run, 1, 1, 1, config)
        halves.append(rows(stage)[0])
    whole, half = halves
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"] / 2, rel=1e-4) and whole["grad_norm"] > 0.01
    assert half["policy_loss"] == pytest.approx(whole["policy_loss"] / 2, abs=1e-6)


def test_the_weighted_loss_is_the_written_out_one():
    """min(exp(old - behaviour), C), no gradient through it; the clip and the dual clip bound the
    ratio of new to old as without weights."""
    generator = torch.Generator().manual_seed(0)
    new, old, behaviour, advantages = torch.randn(4, 3, 7, generator=generator)
    mask = torch.rand(3, 7, generator=generator) < 0.7
    new.requires_grad_()
    weights = losses.importance_weights(old, behaviour, 2.0)
    loss, clipped, kl = losses.policy_loss(new, old, advantages, mask, 0.2, 3.0, 0.3, weights)
    loss.backward()
    ours, new.grad = new.grad, None
    expected = 0.0
    for row, place in mask.nonzero().tolist():
        ratio, advantage = torch.exp(new[row, place] - old[row, place]), advantages[row, place].item()
        worst = max(-ratio * advantage, -min(max(ratio.item(), 0.8), 1.3) * torch.tensor(advantage), key=float)
        if advantage < 0:
            worst = min(worst, torch.tensor(-3.0 * advantage), key=float)
        expected = expected + worst * min(math.exp(old[row, place] - behaviour[row, place]), 2.0)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and torch.allclose(ours, new.grad, atol=1e-6)
    assert weights.max() == 2.0 and (weights < 1).any()
    assert (clipped, kl.item()) == (
        losses.policy_loss(new, old, advantages, mask, 0.2, 3.0, 0.3)[1],
        pytest.approx(losses.policy_loss(new, old, advantages, mask, 0.2, 3.0, 0.3)[2].item()),
    )
