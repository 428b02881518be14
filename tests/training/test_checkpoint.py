"""Checkpoints are complete or not there; a killed and resumed run is the uninterrupted one, bit for bit."""

import hashlib
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from tests.distributed import run
from training import checkpoint, dpo, ppo, reward, sft
from training.config import SFTConfig
from training.main import Interrupted, run_stage
from training.parallel import StopRequest
from training.saving import Saver
from training.settings import ConfigError


def metrics(stage: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    clocked = re.compile("time|.*seconds|tokens_per_second|peak_gb|save_")
    return [{name: value for name, value in row.items() if not clocked.match(name)} for row in rows]


def tensors(stage: Path, iteration: int, model: str) -> dict[str, str]:
    """sha256 of every tensor, weights and optimizer, of a checkpoint, read back whole."""

    def read():
        folder = checkpoint.folder(stage, iteration) / model
        state = dist_checkpointing.load_plain_tensors(str(folder))
        found = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        assert any(key.startswith("optimizer.state.exp_avg") for key in found)
        return {key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for key, value in found.items()}

    return run(read, 1, 1, 1)[0]


def test_absent_iteration_lists_those_present(small_run, tmp_path):
    with pytest.raises(ConfigError, match="iteration 7 is not there; present: 60"):
        checkpoint.resolve(small_run.folder / "sft", 7)
    with pytest.raises(ConfigError, match="present: none"):
        checkpoint.resolve(tmp_path)


def test_an_unfinished_save_is_not_a_checkpoint(small_run, tmp_path):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    (tmp_path / "checkpoints" / ".iter_0000003.saving" / "model").mkdir(parents=True)
    assert checkpoint.iterations(tmp_path) == [2] and checkpoint.latest(tmp_path) == 2


def test_only_the_newest_are_kept(small_run, tmp_path):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=5, save_every=1, keep_checkpoints=2))
    assert checkpoint.iterations(tmp_path) == [4, 5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [0 < row["save_stall_s"] <= row["save_s"] if "save_s" in row else None for row in rows] == [None] + [True] * 4


def test_a_checkpoint_that_a_signal_asked_for_pushes_out_no_regular_one(small_run, tmp_path, monkeypatch):
    """reward.load_iteration = 4 must find its checkpoint although the run was interrupted at 5."""
    settings = small_run.reward(tmp_path, iterations=6, save_every=2, keep_checkpoints=2)
    calls = iter(range(1, 100))

    def stopped_at_5():
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="iteration 5 is saved"):
            patch.setattr(StopRequest, "agreed", lambda self: next(calls) == 5)
            reward.run(settings)

    run(stopped_at_5, 1, 1, 1)
    assert checkpoint.iterations(tmp_path) == [2, 4, 5]
    run(reward.run, 1, 1, 1, settings)
    assert checkpoint.iterations(tmp_path) == [4, 6]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


@pytest.mark.parametrize(("stage", "layout"), [("sft", (1, 2, 1)), ("sft", (2, 1, 2)), ("reward", (2, 2, 1)), ("dpo", (2, 1, 2)),
                                               ("ppo", (1, 2, 1)), ("ppo", (2, 1, 2))])
def test_resumed_equals_uninterrupted_bit_for_bit(small_run, tmp_path, stage, layout):
    """4 iterations straight = 2, a new process, 2 more: weights, optimizer, metrics. Without pipeline the second saves asynchronously;
    at 2 x 1 x 2 it is low-rank adapters that learn."""
    make, trainer, learners = {"sft": (small_run.sft, sft, ["model"]), "reward": (small_run.reward, reward, ["model"]),
                               "dpo": (small_run.dpo, dpo, ["model"]), "ppo": (small_run.ppo, ppo, ["policy", "value"])}[stage]
    settings = dict(layout=layout[:2], iterations=4, save_every=2, **({"lora_rank": 4} if layout[1:] == (1, 2) else {}))
    run(trainer.run, *layout, make(tmp_path / "straight", **settings))
    resumed = make(tmp_path / "resumed", **settings, async_save=layout[1] == 1)
    run(stop_after, *layout, trainer, resumed, 2)
    assert checkpoint.latest(tmp_path / "resumed") == 2
    run(trainer.run, *layout, resumed)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    assert len(metrics(tmp_path / "straight")) == 4
    for model in learners:
        assert tensors(tmp_path / "resumed", 4, model) == tensors(tmp_path / "straight", 4, model)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True], ids=["a new iteration", "an iteration that is there"])
def test_a_kill_before_any_step_of_publishing_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """Random kills (test_saving) rarely hit the microseconds between two renames; here every one is a place to die."""
    def save(stage, iteration, text):
        aside = checkpoint.folder(stage, iteration).with_name(".saving")
        aside.mkdir(parents=True)
        (aside / "state.json").write_text(text)
        checkpoint.publish(stage, aside, iteration)

    def dying(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)
        return call

    survived, place = False, 0
    while not survived:
        stage, left, place = tmp_path / str(place), place, place + 1
        save(stage, 1, "old")
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (checkpoint, "sync"), (checkpoint.shutil, "rmtree"), (Path, "unlink"),
                                (Path, "write_text")):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            aside = checkpoint.folder(stage, 1 if again else 2).with_name(".saving")
            aside.mkdir()
            with open(aside / "state.json", "w") as file:
                file.write("new")
            try:
                checkpoint.publish(stage, aside, 1 if again else 2)
                survived = True
            except Killed:
                pass
        found = checkpoint.latest(stage)
        if found is None:
            assert again, "only a checkpoint that replaces the newest may leave none for a moment"
            continue
        checkpoint.checksums.check(checkpoint.folder(stage, found))
        text = (checkpoint.folder(stage, found) / "state.json").read_text()
        assert text in ("old", "new") and (found == 1 or text == "new")
    assert place > 8 and found == (1 if again else 2) and text == "new"


def stop_after(trainer, config, iteration):
    """The trainer, ended without any clean-up as soon as ``iteration`` is saved."""
    save = Saver.save

    def save_and_die(self, number, state):
        save(self, number, state)
        if number == iteration:
            self.wait()
            raise Killed

    Saver.save = save_and_die
    try:
        trainer.run(config)
    except Killed:
        return


def test_resume_at_another_layout_goes_on_with_equal_losses(small_run, tmp_path):
    """Saved at TP 2 x PP 1, resumed at TP 1 x PP 2 x DP 2: the rest of the losses equal to rounding, Adam's moments included."""
    straight = small_run.sft(tmp_path / "straight", iterations=4, save_every=2)
    run(sft.run, 1, 1, 1, straight)
    run(stop_after, 2, 1, 1, sft, small_run.sft(tmp_path / "moved", layout=(2, 1), iterations=4, save_every=2), 2)
    run(sft.run, 1, 2, 2, small_run.sft(tmp_path / "moved", layout=(1, 2), iterations=4, save_every=2))
    for ours, expected in zip(metrics(tmp_path / "moved"), metrics(tmp_path / "straight"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_a_finished_stage_has_nothing_left_to_do(small_run, tmp_path, capfd):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    before = metrics(tmp_path)
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    assert "nothing left to do" in capfd.readouterr().out and metrics(tmp_path) == before


@pytest.mark.parametrize(("code", "message"), [(65, r"model/__0_0\.distcp .* does not have the sha256"),
                                               (74, "failed on rank 0: .*File too large")])
def test_exit_code_tells_a_damaged_checkpoint_from_a_failed_save(small_run, tmp_path, capfd, code, message):
    """One line, not a traceback; the checkpoint before is named."""
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    config = small_run.sft(tmp_path, iterations=3)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))

    def stage():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(21000 + os.getpid() % 9000))
        sys.argv = ["sft", str(tmp_path / "config.json")]
        if code == 74:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        os._exit(run_stage(SFTConfig, sft.run))

    if code == 65:
        with open(checkpoint.resolve(tmp_path) / "model" / "__0_0.distcp", "r+b") as file:
            file.seek(1000)
            file.write(b"damage")
    process = multiprocessing.get_context("fork").Process(target=stage)
    process.start()
    process.join(60)
    shown = capfd.readouterr().err
    assert process.exitcode == code and re.search(f"^error: .*{message}", shown, re.MULTILINE) and "Traceback" not in shown, shown
    assert checkpoint.latest(tmp_path) == 2


def start(module: str, config, world: int) -> list[subprocess.Popen]:
    """The stage's real command line, one process a rank."""
    folder = Path(config.paths.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    port = str(20000 + os.getpid() % 10000)
    return [subprocess.Popen([sys.executable, "-W", "ignore", "-m", module, str(folder / "config.json")], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"})
            for rank in range(world)]


def test_term_saves_at_the_step_boundary_and_asks_to_go_on(small_run, tmp_path):
    """TERM at one rank: both save the same iteration, wait until it is written, and exit 75 (EX_TEMPFAIL)."""
    ranks = start("training.sft", small_run.sft(tmp_path, layout=(1, 2), iterations=5000, async_save=True), 2)
    try:
        end = time.monotonic() + 90
        while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
            assert time.monotonic() < end and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        ranks[1].send_signal(signal.SIGTERM)
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [75, 75], outputs
    saved = checkpoint.latest(tmp_path)
    assert checkpoint.iterations(tmp_path) == [saved] and metrics(tmp_path)[-1]["iteration"] == saved
