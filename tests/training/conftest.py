"""A small prepared run for the trainers' tests: demo data, a two-layer model with six heads, its
Megatron checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from tests.support.distributed import run
from training import reward, sft
from training.config.data import DataConfig, ModelConfig, PrepareConfig, PreparePaths
from training.config.trainers import DPOConfig, GRPOConfig, Paths, PPOConfig, PPOPaths, RewardConfig, SFTConfig
from training.data.prepare import prepare


def trainer(layout: tuple[int, int], iterations: int, **values) -> dict:
    """Arguments of a small fp32 trainer with the layout (tensor, pipeline)."""
    small = dict(
        precision="fp32",
        iterations=iterations,
        micro_batch_size=2,
        global_batch_size=8,
        lr=1e-3,
        warmup_iterations=0,
        eval_every=1000,
        save_every=1000,
    )
    return {**small, "tensor_parallel": layout[0], "pipeline_parallel": layout[1], **values}


class Run:
    """Paths of a run folder, and the trainers' configurations for it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = str(folder / "model")

    def data(self, name: str) -> str:
        return str(self.folder / "data" / f"{name}.jsonl")

    def sft(self, output: Path, layout=(1, 1), iterations=2, **values) -> SFTConfig:
        paths = Paths(str(output), self.model, str(self.folder / "convert"), self.data("sft"), self.data("sft_heldout"))
        return SFTConfig(paths=paths, **trainer(layout, iterations, **({"seq_length": 80} | values)))

    def reward(self, output: Path, layout=(1, 1), iterations=2, **values) -> RewardConfig:
        paths = Paths(
            str(output), self.model, str(self.folder / "sft"), self.data("reward"), self.data("reward_heldout")
        )
        return RewardConfig(
            paths=paths, seq_length=80, **trainer(layout, iterations, **({"calibration_samples": 40} | values))
        )

    def dpo(self, output: Path, layout=(1, 1), iterations=2, **values) -> DPOConfig:
        paths = Paths(
            str(output), self.model, str(self.folder / "sft"), self.data("reward"), self.data("reward_heldout")
        )
        return DPOConfig(paths=paths, **trainer(layout, iterations, **({"seq_length": 80} | values)))

    def grpo(self, output: Path, layout=(1, 1), iterations=2, **values) -> GRPOConfig:
        small = dict(
            prompt_length=48,
            response_length=8,
            rollout_batch_size=16,
            generation_batch_size=8,
            group_size=4,
            clip_grad=1.0,
        )
        return GRPOConfig(paths=self.ppo(output).paths, **trainer(layout, iterations, **(small | values)))

    def ppo(self, output: Path, layout=(1, 1), iterations=2, **values) -> PPOConfig:
        paths = PPOPaths(
            str(output),
            self.model,
            str(self.folder / "sft"),
            self.data("rlhf"),
            self.data("heldout"),
            str(self.folder / "reward"),
        )
        small = dict(
            prompt_length=48,
            response_length=8,
            rollout_batch_size=16,
            generation_batch_size=8,
            value_lr=1e-3,
            clip_grad=1.0,
        )
        return PPOConfig(paths=paths, **trainer(layout, iterations, **(small | values)))


@pytest.fixture(scope="session")
def family_run(tmp_path_factory):
    """Gives the prepared run of a family, by its name."""

    @functools.cache
    def of(family: str) -> Run:
        return prepared(Run(tmp_path_factory.mktemp(family)), family)

    return of


@pytest.fixture(scope="session")
def small_run(family_run) -> Run:
    return family_run("bloom")


def prepared(made: Run, family: str) -> Run:
    model = ModelConfig(demo_family=family, demo_layers=2, demo_hidden=48, demo_heads=6)
    prepare(PrepareConfig(PreparePaths(str(made.folder / "data"), made.model), model, DataConfig(heldout_max=16)))
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(made.folder / "convert"), made.model)))
    run(sft.run, 1, 1, 1, made.sft(made.folder / "sft", iterations=60, lr=5e-3))
    run(reward.run, 1, 1, 1, made.reward(made.folder / "reward", iterations=4))
    return made
