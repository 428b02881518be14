"""Every trainer on the device, from data to the last checkpoint: bf16 and Triton's kernels on a
GPU, tiny in fp32 on a CPU."""

import json
import math

import pytest

from tests.gpu.conftest import CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

OPTIONS = {"bloom": {"optimizer_precision": "bf16", "async_save": True}, "llama": {"offload": "all"}}
"""Beside both families, what else has a path of its own on a GPU."""


@pytest.fixture(scope="module", params=["bloom", "llama"])
def prepared(request, tmp_path_factory, one_rank):
    """(the trainers' configurations, the family)."""
    from conversion.config import ConvertConfig, ConvertPaths
    from conversion.hf_to_megatron import convert
    from tests.training.conftest import Run
    from training import reward, sft
    from training.config.data import DataConfig, ModelConfig, PrepareConfig, PreparePaths
    from training.data.prepare import prepare

    run = Run(tmp_path_factory.mktemp(request.param))
    model = ModelConfig(demo_family=request.param, demo_layers=2, demo_hidden=64, demo_heads=4)
    prepare(PrepareConfig(PreparePaths(str(run.folder / "data"), run.model), model, DataConfig(heldout_max=16)))
    convert(ConvertConfig(paths=ConvertPaths(str(run.folder / "convert"), run.model)))
    sft.run(run.sft(run.folder / "sft", iterations=20, lr=5e-3, sample_every=20, **settings(request.param, "sft")))
    reward.run(run.reward(run.folder / "reward", iterations=4, **settings(request.param, "reward")))
    return run, request.param


def settings(family: str, stage: str) -> dict:
    """SDPA: the compiled layers have a test of their own, and take most of a minute to compile."""
    options = {name: value for name, value in OPTIONS[family].items() if name != "offload" or stage in ("ppo", "grpo")}
    if not CUDA:
        options.pop("optimizer_precision", None)
    return {"precision": "bf16" if CUDA else "fp32", "attention": "sdpa", **options}


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_sft_learns(prepared):
    run, _ = prepared
    losses = [row["loss"] for row in rows(run.folder / "sft")]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_a_stage_runs_to_its_end(prepared, stage):
    """PPO and GRPO check their own invariants on the way: the first KL is 0, the first ratio 1."""
    from training import dpo, grpo, ppo

    run, family = prepared
    config = getattr(run, stage)(run.folder / stage, iterations=3, eval_every=3, **settings(family, stage))
    {"dpo": dpo, "ppo": ppo, "grpo": grpo}[stage].run(config)
    history = rows(run.folder / stage)
    assert len(history) == 3 and all(math.isfinite(row["grad_norm"]) for row in history)
    assert (run.folder / stage / "latest").read_text().strip().endswith("3")
