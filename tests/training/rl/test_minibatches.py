"""Rows by a token budget change what is computed together, not the numbers."""

from dataclasses import replace

import pytest
import torch

from tests.support.distributed import run
from tests.support.layouts import enter
from tests.support.learners import SHAPE
from tests.support.ppo_settings import settings
from training import ppo
from training.config.trainers import PPOConfig
from training.data.batches import Example, collate
from training.distributed import groups
from training.errors import ConfigError
from training.models.heads import next_token_logprobs
from training.rl.minibatches import plan
from training.trainer.step import Learner, build_model

LENGTHS = [5, 40, 9, 12, 33, 7, 11, 38, 6, 8, 24, 10]


def samples() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    examples = [
        Example(torch.randint(0, 300, (length,), generator=generator).tolist(), max(1, length // 2))
        for length in LENGTHS
    ]
    batch = collate(examples, 299, 48)
    shape = batch["tokens"].shape
    return {
        **batch,
        "old_logprobs": -6 - torch.rand(shape, generator=generator),
        "advantages": torch.randn(shape, generator=generator),
    }


def both_ways(config: PPOConfig) -> dict:
    """Log-probabilities and a policy step of each minibatch, with the budget and without -> what
    this rank saw."""
    enter(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
    model = build_model(SHAPE, config, "lm")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(len(name)))
    learner, batch, seen = Learner(model, config, config.lr, 100, 0), samples(), {}
    for name, tokens in (("budget", config.micro_batch_tokens), ("padded", 0)):
        rows = plan(replace(config, micro_batch_tokens=tokens), SHAPE, LENGTHS, 8)
        logprobs = rows.look(
            learner.wrapped,
            batch,
            lambda output, micro: next_token_logprobs(output, micro["tokens"], mask=micro["response_mask"]),
        )
        minibatches = [rows.micro_batches(batch, number) for number in (0, 1)]
        steps = [learner.step(minibatch, ppo.policy_objective(config)) for minibatch in minibatches]
        computed = [sum(micro["tokens"].numel() for micro in minibatch) for minibatch in minibatches]
        seen[name] = (
            logprobs[batch["response_mask"]],
            steps,
            computed,
            [len(minibatch) for minibatch in minibatches],
            rows,
        )
    return seen | {"rank": groups.data_rank()}


@pytest.mark.parametrize(
    ("layout", "values"),
    [((1, 1, 1), {}), ((2, 1, 2), {"sequence_parallel": True}), ((1, 2, 1), {"virtual_pipeline": 2}), ((1, 2, 2), {})],
)
def test_a_token_budget_gives_the_padded_numbers(layout, values):
    """12 samples of 5 to 40 tokens in minibatches of 8 and 4: log-probabilities, losses, entropy
    and gradient norms; all ranks have as many micro-batches of one shape, and less is computed."""
    tensor, pipeline, _ = layout
    config = settings(tensor_parallel=tensor, pipeline_parallel=pipeline, micro_batch_tokens=100, **values)
    ranks = run(both_ways, *layout, config)
    for seen in ranks:
        logprobs, steps, computed, counts, rows = seen["budget"]
        expected, padded_steps, padded, _, _ = seen["padded"]
        assert torch.allclose(logprobs, expected, atol=2e-5)
        for ours, theirs in zip(steps, padded_steps, strict=True):
            for name in ("policy_loss", "entropy", "approx_kl", "grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
        assert all(ours < 0.9 * theirs for ours, theirs in zip(computed, padded, strict=True))
        assert counts == ranks[0]["budget"][3], "as many micro-batches on every rank"
        assert all(layout.length * layout.micro_batch_size <= config.micro_batch_tokens for layout in rows.minibatches)
        assert rows.efficiency > 0.55
    plans = [rank["budget"][4] for rank in {seen["rank"]: seen for seen in ranks}.values()]
    placed = [sample for rows in plans for layout in rows.minibatches for row in layout.rows for sample in row]
    assert sorted(placed) == list(range(12)), "each sample once over the data-parallel ranks"


def test_a_budget_needs_no_micro_batches_of_rows():
    config = settings(micro_batch_size=4, pipeline_parallel=2, virtual_pipeline=2)
    with pytest.raises(ConfigError, match="the interleaved schedule takes micro-batches in groups"):
        config.data_parallel(4)
    assert replace(config, micro_batch_tokens=48).data_parallel(4) == 2
    with pytest.raises(
        ValueError, match="micro_batch_tokens = 47: expected 0 .off. or at least prompt_length . response_length = 48"
    ):
        replace(config, micro_batch_tokens=47)
