"""The trainers in bf16, as they run on GPUs: tolerances are bf16's, 2^-8 of a number, not rounding
of sums."""

import json
import math

import pytest

from tests.support.distributed import run
from training import dpo, grpo, ppo, reward, sft
from training.rl.invariants import TOLERANCE

TRAINERS = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo, "grpo": grpo}
STEPS = 4


def rows(stage):
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def in_fp32(family_run, tmp_path_factory):
    """(family, stage) -> the rows of fp32 on one rank, made once."""
    made = {}

    def of(prepared, family: str, stage: str):
        if (family, stage) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{stage}")
            run(TRAINERS[stage].run, 1, 1, 1, getattr(prepared, stage)(folder, iterations=STEPS))
            made[family, stage] = rows(folder)
        return made[family, stage]

    return of


@pytest.mark.parametrize(
    ("stage", "family", "layout", "values"),
    [
        ("sft", "bloom", (1, 1, 1), {"optimizer_precision": "bf16"}),
        ("sft", "bloom", (2, 1, 1), {"sequence_parallel": True}),
        ("reward", "qwen2", (1, 2, 1), {}),
        ("dpo", "llama", (1, 1, 2), {"recompute": "full"}),
    ],
)
def test_it_learns_as_in_fp32(family_run, in_fp32, tmp_path, family, layout, values, stage):
    """Losses of all steps and the first gradient's norm."""
    prepared = family_run(family)
    config = getattr(prepared, stage)(tmp_path, layout=layout[:2], iterations=STEPS, precision="bf16", **values)
    run(TRAINERS[stage].run, *layout, config)
    for ours, expected in zip(rows(tmp_path), in_fp32(prepared, family, stage), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=0.03), ours["iteration"]
    assert rows(tmp_path)[0]["grad_norm"] == pytest.approx(in_fp32(prepared, family, stage)[0]["grad_norm"], rel=0.1)


@pytest.mark.parametrize(
    ("stage", "family", "layout", "values"),
    [
        ("ppo", "bloom", (1, 1, 1), {"optimizer_precision": "bf16", "micro_batch_tokens": 120}),
        ("grpo", "bloom", (2, 1, 1), {"sequence_parallel": True}),
        ("ppo", "qwen3", (1, 2, 1), {"generation_tensor_parallel": 2}),
        ("grpo", "llama", (1, 1, 2), {"lora_rank": 4, "lr": 1e-2}),
    ],
)
def test_what_holds_exactly_holds_to_bf16(family_run, tmp_path, family, layout, values, stage):
    """The trainers' own invariants are checked on the way. Samples are not fp32's: a draw may fall
    to another token."""
    prepared = family_run(family)
    config = getattr(prepared, stage)(
        tmp_path, layout=layout[:2], iterations=2, precision="bf16", global_batch_size=16, **values
    )
    run(TRAINERS[stage].run, *layout, config)
    first, second = rows(tmp_path)
    small = TOLERANCE["bf16"]
    assert 0 <= first["kl_k3"] <= small * first["response_length"] and 0 <= first["approx_kl"] <= small
    assert 1 <= first["token_mult_prob_error"] <= 1.03 and first["logprob_error"] > 0
    assert all(
        math.isfinite(row[name])
        for row in (first, second)
        for name in ("policy_loss", "grad_norm", "entropy", "reward")
    )
    assert first["skipped_updates"] == second["skipped_updates"] == 0 and second["kl_k3"] > 0
