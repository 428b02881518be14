"""A rollout engine whose cache finds no room: what reads samples goes on without, what learns from
them tries again, then elsewhere."""

import json
import multiprocessing
import os
import re
import sys
from dataclasses import asdict

import pytest
import torch

from tests.support.distributed import run
from training import ppo, sft
from training.config.trainers import PPOConfig
from training.distributed import groups as parallel
from training.generation.engine import Engine
from training.main import run_stage


def starve(monkeypatch, rank: int, calls: set[int]) -> None:
    """On ``rank`` no memory is left for a cache at the engine's calls of these numbers."""
    affordable, count = Engine._affordable, [0]

    def none_left(self, page_bytes, rows):
        count[0] += 1
        return 0 if count[0] in calls and torch.distributed.get_rank() == rank else affordable(self, page_bytes, rows)

    monkeypatch.setattr(Engine, "_affordable", none_left)


def rows(stage):
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def test_sft_goes_on_without_its_samples(small_run, tmp_path, monkeypatch, capfd):
    """One of two data-parallel ranks has no room in the second iteration; the other must not wait
    for it."""
    starve(monkeypatch, 1, {2, 3})
    run(sft.run, 1, 1, 2, small_run.sft(tmp_path, iterations=3, sample_every=1))
    shown = capfd.readouterr().out
    assert len(re.findall("warning: no sample replies: request 0 needs .* the cache has room for 0", shown)) == 1
    assert len(rows(tmp_path)) == 3


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1)])
def test_a_rollout_is_tried_again(small_run, tmp_path, monkeypatch, layout):
    """Once memory that the allocator holds in pieces is given back. The samples are those of a run
    that had room."""
    run(ppo.run, *layout, small_run.ppo(tmp_path / "room", layout=layout[:2], iterations=2))
    starve(monkeypatch, 0, {2})
    if layout == (2, 1, 1):
        starve(monkeypatch, 1, {2})
    run(ppo.run, *layout, small_run.ppo(tmp_path / "starved", layout=layout[:2], iterations=2))
    names = ("reward", "kl", "policy_loss", "response_length")
    assert [[row[name] for name in names] for row in rows(tmp_path / "starved")] == [
        [row[name] for name in names] for row in rows(tmp_path / "room")
    ]


def stage(config: str) -> None:
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(21000 + os.getpid() % 9000)
    )
    sys.argv = ["ppo", config]
    os._exit(run_stage(PPOConfig, ppo.run))


@pytest.mark.parametrize(("calls", "code"), [({1, 2}, 64), ({3, 4}, 75)], ids=["from the start", "later on"])
def test_a_rollout_without_room_is_the_configuration_s_or_the_process_s_fault(
    small_run, tmp_path, monkeypatch, capfd, calls, code
):
    """From the start: bad configuration. After iterations that had room: another process goes on
    from what is saved."""
    config = small_run.ppo(tmp_path, iterations=3, save_every=1)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    starve(monkeypatch, 0, calls)
    process = multiprocessing.get_context("fork").Process(target=stage, args=(str(tmp_path / "config.json"),))
    process.start()
    process.join(60)
    error = capfd.readouterr().err
    assert process.exitcode == code and "error: request 0 needs" in error and "Traceback" not in error, error


def test_groups_wait_as_long_as_the_key_says(monkeypatch):
    """torch's and megatron-core's groups: their defaults, 10 and 30 minutes, are less than a
    rollout may take."""
    from torch.distributed.distributed_c10d import _get_default_group

    def timeouts():
        from megatron.core import parallel_state

        groups = (
            _get_default_group(),
            parallel_state.get_data_parallel_group(),
            parallel_state.get_model_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
        )
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    ranks = parallel.ranks
    monkeypatch.setattr(
        "tests.support.distributed.ranks", lambda *given, **more: ranks(*given, **more, timeout_minutes=90)
    )
    assert run(timeouts, 2, 1, 1) == [[5400.0] * 4] * 2
