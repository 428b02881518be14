"""Step times on paper: the one machine that was measured comes out as measured, and what links and
layouts do has the right sign."""

import dataclasses
import re

import pytest

from launcher.config.profile import Machine, Profile
from launcher.config.sections import Resources
from launcher.estimates import iteration_time, step_time
from launcher.slurm import network
from training.config.trainers import Paths, PPOConfig, PPOPaths, SFTConfig
from training.models.bloom.table import shape as bloom

SHAPES = {
    "560m": bloom(24, 1024, 16, 250880, 1e-5),
    "1b7": bloom(24, 2048, 16, 250880, 1e-5),
    "3b": bloom(30, 2560, 32, 250880, 1e-5),
    "7b1": bloom(30, 4096, 32, 250880, 1e-5),
}

ONE_MACHINE = step_time.known_rates("h200", network.named("one-machine"))


def sft(**values) -> SFTConfig:
    small = {"micro_batch_size": 1, "global_batch_size": 64, "optimizer_precision": "bf16"}
    return SFTConfig(paths=Paths("", "", "", "", ""), **{**small, **values})


@pytest.mark.parametrize(
    "model, rows, global_rows, measured",
    [("560m", 16, 32, 121640), ("1b7", 16, 32, 49515), ("3b", 8, 32, 27231), ("7b1", 4, 16, 12965)],
)
def test_one_h200_as_measured(model, rows, global_rows, measured):
    """benchmarks/training/train.py: tokens/s of a full step."""
    config = sft(micro_batch_size=rows, global_batch_size=global_rows)
    made = step_time.step(SHAPES[model], config, 1, ONE_MACHINE, 1)
    assert global_rows * 2048 / made.seconds == pytest.approx(measured, rel=0.005)


@pytest.mark.parametrize(
    "ranks, layout, measured",
    [
        (2, {}, 23440),
        (2, {"tensor_parallel": 2, "micro_batch_size": 4}, 23100),
        (2, {"pipeline_parallel": 2}, 22170),
        (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, 22970),
        (4, {"pipeline_parallel": 4}, 41150),
        (4, {"tensor_parallel": 4, "micro_batch_size": 4}, 40550),
        (4, {"micro_batch_size": 2}, 48720),
    ],
)
def test_h100s_nearly_as_measured(ranks, layout, measured):
    """benchmarks/multi_gpu/run.sh: tokens/s of a full step of 7b1. TP 2 x PP 2 with one row waits
    for the host half of its time."""
    machine = dataclasses.replace(ONE_MACHINE, memory_gb_s=3350)
    config = sft(global_batch_size=8 * ranks, sequence_parallel=layout.get("tensor_parallel", 1) > 1, **layout)
    made = step_time.step(SHAPES["7b1"], config, ranks, machine, ranks)
    assert 8 * ranks * 2048 / made.seconds == pytest.approx(measured, rel=0.06)
    assert (made.parts["launch"] > 0.4 * made.seconds) == (layout == {"tensor_parallel": 2, "pipeline_parallel": 2})


def ppo(**values) -> PPOConfig:
    """Of 512 tokens a prompt and a reply."""
    alike = {"optimizer_precision": "bf16", "prompt_length": 512, "response_length": 512, "global_batch_size": 64}
    return PPOConfig(paths=PPOPaths("", "", "", "", "", ""), **{**alike, **values})


SHORT = {"prompt_length": 256, "response_length": 256, "rollout_batch_size": 256}
TP_2 = {"tensor_parallel": 2, "sequence_parallel": True, "generation_tensor_parallel": 1}


@pytest.mark.parametrize(
    "model, ranks, settings, rows, measured",
    [
        ("7b1", 1, {"rollout_batch_size": 128, "micro_batch_tokens": 4096, "offload": "all"}, 4, (10.3, 11.5, 19.9)),
        ("1b7", 2, SHORT | TP_2 | {"micro_batch_tokens": 16384}, 32, (1.75, 1.90, 2.85)),
        (
            "1b7",
            2,
            SHORT | {"pipeline_parallel": 2, "generation_tensor_parallel": 2, "micro_batch_tokens": 4096},
            8,
            (1.94, 1.66, 3.31),
        ),
        ("7b1", 2, SHORT | TP_2 | {"micro_batch_tokens": 8192, "offload": "all"}, 16, (4.88, 7.50, 11.66)),
        ("1b7", 4, SHORT | TP_2 | {"pipeline_parallel": 2, "micro_batch_tokens": 2048}, 4, (1.25, 6.18, 9.01)),
    ],
)
def test_an_iteration_of_ppo_nearly_as_measured(model, ranks, settings, rows, measured):
    """benchmarks/training/ppo.py on one H200; benchmarks/multi_gpu/run.sh on H100s, the last of
    which wait for the host nearly all of the time."""
    machine = dataclasses.replace(ONE_MACHINE, memory_gb_s=4800 if ranks == 1 else 3350)
    made = iteration_time.iteration(SHAPES[model], ppo(**settings), ranks, machine, ranks)
    assert made.micro_batch == (rows, 1024 if ranks == 1 else 512)
    assert (made.generate, made.score, made.update) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"tensor_parallel": 4, "micro_batch_size": 1},
            r"fastest that fits \S+ s \(\d+ GB\) with --set rlhf.micro_batch_tokens=8192$",
        ),
        ({"tensor_parallel": 4, "micro_batch_tokens": 8192}, "no other micro_batch_tokens that fits is faster$"),
        ({}, "no other micro_batch_tokens that fits is faster$"),
    ],
)  # 2 rows keep a GPU busy that has whole layers
def test_small_micro_batches_of_rollouts_are_told(settings, says):
    config, asked = ppo(rollout_batch_size=512, global_batch_size=128, **settings), Resources(gpus_per_node=8)
    site = Profile(
        name="site", scheduler="slurm", gpu="h800", network_table=network.named("h800-roce"), gpu_memory_gb=160.0
    )
    assert re.search(says, iteration_time.suggest("rlhf", SHAPES["7b1"], config, asked, site))
    unsaid = dataclasses.replace(site, gpu_memory_gb=0)
    assert "does not say gpu_memory_gb" in iteration_time.suggest("rlhf", SHAPES["7b1"], config, asked, unsaid)


def test_each_way_to_divide_costs_what_it_must():
    machine, shape = step_time.known_rates("a100", network.named("a100-hdr-infiniband")), SHAPES["7b1"]

    def parts(ranks=8, **values):
        return step_time.step(shape, sft(**values), ranks, machine, 8).parts

    alone = parts(ranks=1)
    assert [alone[name] for name in ("bubble", "tensor", "pipeline", "data")] == [0, 0, 0, 0]
    assert parts()["compute"] == pytest.approx(alone["compute"] / 8)
    pipeline = parts(pipeline_parallel=8)  # one data rank: 64 micro-batches, a bubble of 7 of them
    assert pipeline["bubble"] == pytest.approx(7 / 64 * pipeline["compute"])
    assert pipeline["pipeline"] == pytest.approx(2 * (64 * 2 * 2048 * 4096 / (0.8 * 300e9) + 71 * 1.5e-3))
    tensor = parts(tensor_parallel=8, sequence_parallel=True)
    sums = 64 * 4 * 30
    assert tensor["tensor"] == pytest.approx(sums * (2 * 2048 * 4096 * 2 * 7 / 8 / (0.54 * 300e9) + 2 * 20e-6))
    best = step_time.layouts(shape, sft(), 8, machine, 8, 85.0)
    assert (
        best and best[0].seconds == min(made.seconds for made in best) and all(made.memory_gb <= 76.5 for made in best)
    )


def suggestion(config: SFTConfig, asked: Resources, shape=SHAPES["7b1"], **site) -> str:
    known = {"gpu": "h800", "network_table": network.named("h800-roce"), "gpu_memory_gb": 85.0}
    return step_time.suggest("sft", shape, config, asked, Profile(name="site", scheduler="slurm", **{**known, **site}))


def taken(config: SFTConfig, words: str) -> SFTConfig:
    """The configuration with the suggested words on its command line."""
    found = dict(re.findall(r"--set sft\.(\w+)=(\S+)", words))
    kinds = {"true": True, "false": False}
    values = {name: kinds.get(value, int(value) if value.isdigit() else value) for name, value in found.items()}
    return dataclasses.replace(config, **values)


@pytest.mark.parametrize(
    ("shape", "asked", "settings"),
    [
        (
            SHAPES["7b1"],
            Resources(gpus_per_node=8),
            {"pipeline_parallel": 2, "virtual_pipeline": 2},
        ),  # PP 1 has no parts
        (
            SHAPES["7b1"],
            Resources(gpus_per_node=8),
            {"pipeline_parallel": 4, "virtual_pipeline": 2},
        ),  # faster than any that is tried
        (SHAPES["7b1"], Resources(gpus_per_node=3), {"pipeline_parallel": 3}),
        (SHAPES["7b1"], Resources(nodes=2, gpus_per_node=4), {"tensor_parallel": 2}),
        (bloom(30, 2560, 10, 250880, 1e-5), Resources(gpus_per_node=8), {}),  # 10 heads: TP 1 or 2
    ],
)
def test_what_is_suggested_can_be_run_and_is_no_slower(shape, asked, settings):
    config = sft(**settings)
    words = suggestion(config, asked, shape)
    then = taken(config, words)
    shape.check_layout(then.tensor_parallel, then.pipeline_parallel, then.virtual_pipeline)
    assert asked.ranks_per_node % then.tensor_parallel == 0  # its links are those inside a node
    before, after = (
        step_time.step(
            shape, one, asked.ranks, step_time.known_rates("h800", network.named("h800-roce")), asked.ranks_per_node
        )
        for one in (config, then)
    )
    assert after.seconds <= before.seconds and f"fastest that fits {after.seconds:.2f} s" in words


def test_a_site_s_own_rates_are_taken_and_missing_ones_are_named():
    asked, config = Resources(gpus_per_node=8), sft()
    unknown = {"gpu": "", "network_table": network.named("auto")}
    assert suggestion(config, asked, **unknown).count("machine.") == 4
    assert "does not say gpu_memory_gb; " in suggestion(config, asked, gpu_memory_gb=0)
    own = {"tflops": 989.0, "memory_gb_s": 3350.0, "inside_gb_s": 200.0, "outside_gb_s": 50.0}
    assert suggestion(config, asked, **unknown, machine=own) == suggestion(config, asked)
    assert suggestion(config, asked, machine={"tflops": 100.0}) != suggestion(config, asked)
    assert "no layout of 8 ranks fits 90% of 10 GB" in suggestion(config, asked, gpu_memory_gb=10.0)
    for value in (-1.0, float("nan"), float("inf"), 1e-320):
        with pytest.raises(ValueError, match="tflops = .*: expected a rate of at least 0.001, or 0"):
            Machine(tflops=value)
    with pytest.raises(ValueError, match="gpu_memory_gb = nan: expected at least 0"):
        Profile(name="site", scheduler="slurm", gpu_memory_gb=float("nan"))
