"""Step times on paper: the one machine that was measured comes out as measured, and what links and layouts do has the right sign."""

import pytest

from launcher import scaling
from training.config import Paths, SFTConfig
from training.families.bloom import shape as bloom

SHAPES = {"7b1": bloom(30, 4096, 32, 250880, 1e-5), "1b7": bloom(24, 2048, 16, 250880, 1e-5), "3b": bloom(30, 2560, 32, 250880, 1e-5)}


def sft(**values) -> SFTConfig:
    small = {"micro_batch_size": 1, "global_batch_size": 64, "optimizer_precision": "bf16"}
    return SFTConfig(paths=Paths("", "", "", "", ""), **{**small, **values})


@pytest.mark.parametrize("model, rows, global_rows, measured", [("7b1", 4, 16, 2.567), ("1b7", 16, 32, 1.366), ("3b", 8, 32, 2.407)])
def test_one_h200_as_measured(model, rows, global_rows, measured):
    """benchmarks/train.py: seconds of a full step."""
    config = sft(micro_batch_size=rows, global_batch_size=global_rows)
    assert scaling.step(SHAPES[model], config, 1, scaling.MACHINES["one-machine"], 1).seconds == pytest.approx(measured, rel=0.02)


def test_each_way_to_divide_costs_what_it_must():
    machine, shape = scaling.MACHINES["a100-hdr-infiniband"], SHAPES["7b1"]

    def parts(ranks=8, **values):
        return scaling.step(shape, sft(**values), ranks, machine, 8).parts

    alone = parts(ranks=1)
    assert [alone[name] for name in ("bubble", "tensor", "pipeline", "data")] == [0, 0, 0, 0]
    assert parts()["compute"] == pytest.approx(alone["compute"] / 8)
    pipeline = parts(pipeline_parallel=8)  # one data rank: 64 micro-batches, a bubble of 7 of them
    assert pipeline["bubble"] == pytest.approx(7 / 64 * pipeline["compute"])
    tensor = parts(tensor_parallel=8, sequence_parallel=True)
    assert tensor["tensor"] == pytest.approx(64 * 4 * 30 * 2 * 2048 * 4096 * 2 * 7 / 8 / (0.8 * 300e9))
    best = scaling.layouts(shape, sft(), 8, machine, 8, 85.0)
    assert best and best[0].seconds == min(made.seconds for made in best) and all(made.memory_gb <= 76.5 for made in best)
