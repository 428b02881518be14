"""Checkpoints are complete or not there; a killed and resumed run is the uninterrupted one, bit for
bit."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from tests.support.distributed import run
from training import dpo, grpo, ppo, reward, sft
from training.checkpoint import checksums, format
from training.checkpoint.stage_folder import StageFolder
from training.checkpoint.writer import Saver
from training.config.trainers import SFTConfig
from training.distributed.groups import StopRequest
from training.errors import ConfigError, Damaged, Interrupted
from training.files import atomic
from training.main import run_stage
from training.trainer.loop import Boundary


def metrics(stage: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    clocked = re.compile("time|.*seconds|.*tokens_per_second|rollout_tail_share|peak_gb|save_")
    return [{name: value for name, value in row.items() if not clocked.match(name)} for row in rows]


def tensors(stage: Path, iteration: int, model: str) -> dict[str, str]:
    """sha256 of every tensor, weights and optimizer, of a checkpoint, read back in full."""

    def read():
        folder = StageFolder(stage).checkpoint(iteration) / model
        state = dist_checkpointing.load_plain_tensors(str(folder))
        values = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        assert any(key.startswith("optimizer.state.exp_avg") for key in values)
        return {
            key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, value in values.items()
        }

    return run(read, 1, 1, 1)[0]


def test_absent_iteration_lists_those_present(small_run, tmp_path):
    with pytest.raises(ConfigError, match="iteration 7 is not there; present: 60"):
        StageFolder(small_run.folder / "sft").resolve(7)
    with pytest.raises(ConfigError, match="present: none"):
        StageFolder(tmp_path).resolve()


def test_an_unfinished_save_is_not_a_checkpoint(small_run, tmp_path):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    (tmp_path / "checkpoints" / ".iter_0000003.saving" / "model").mkdir(parents=True)
    assert StageFolder(tmp_path).iterations() == [2] and StageFolder(tmp_path).latest() == 2


def test_only_the_newest_are_kept(small_run, tmp_path):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=5, save_every=1, keep_checkpoints=2))
    assert StageFolder(tmp_path).iterations() == [4, 5]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [0 < row["save_stall_s"] <= row["save_s"] if "save_s" in row else None for row in rows] == [None] + [
        True
    ] * 4


def test_a_checkpoint_that_a_signal_asked_for_pushes_out_no_regular_one(small_run, tmp_path, monkeypatch):
    """reward.load_iteration = 4 must find its checkpoint although the run was interrupted at 5."""
    settings = small_run.reward(tmp_path, iterations=6, save_every=2, keep_checkpoints=2)
    calls = iter(range(1, 100))

    def stopped_at_5():
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="iteration 5 is saved"):
            patch.setattr(StopRequest, "agreed", lambda self: next(calls) == 5)
            reward.run(settings)

    run(stopped_at_5, 1, 1, 1)
    assert StageFolder(tmp_path).iterations() == [2, 4, 5]
    run(reward.run, 1, 1, 1, settings)
    assert StageFolder(tmp_path).iterations() == [4, 6]
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


PPO = dict(rollout_batch_size=8, global_batch_size=4, response_length=4, kl_target=0.5, kl_horizon=50, gate_after=0)
"""Two updates an iteration; the controller moves, and so do the gates' counts."""


@pytest.mark.parametrize(
    ("stage", "layout", "values", "family"),
    [
        ("sft", (2, 1, 2), {}, "qwen3"),
        ("reward", (2, 2, 1), {}, "qwen2"),
        ("dpo", (1, 1, 2), {"lora_rank": 4}, "mistral"),
        ("grpo", (1, 1, 2), PPO | {"group_size": 2}, "bloom"),
        ("ppo", (1, 2, 1), PPO | {"micro_batch_tokens": 80, "offload": "all"}, "bloom"),
        ("ppo", (2, 1, 2), PPO | {"value_warmup": 4, "lora_rank": 4}, "llama"),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(family_run, tmp_path, stage, layout, values, family):
    """8 iterations straight = killed by SIGKILL at a random moment behind iteration 3, resumed:
    weights, optimizer, state and metrics. Without pipeline the second saves asynchronously."""
    prepared = family_run(family)
    make, trainer, learners = {
        "sft": (prepared.sft, sft, ["model"]),
        "reward": (prepared.reward, reward, ["model"]),
        "dpo": (prepared.dpo, dpo, ["model"]),
        "ppo": (prepared.ppo, ppo, ["policy", "value"]),
        "grpo": (prepared.grpo, grpo, ["policy"]),
    }[stage]
    settings = dict(layout=layout[:2], iterations=8, **values)
    run(trainer.run, *layout, make(tmp_path / "straight", **settings))
    resumed = make(tmp_path / "resumed", **settings, save_every=3, async_save=layout[1] == 1)
    with pytest.raises(AssertionError, match=r"ranks ended with .*-9|Connection (closed|reset) by peer|Broken pipe"):
        run(kill_after_3, *layout, trainer, resumed, f"{stage} {layout}")
    assert StageFolder(tmp_path / "resumed").latest() in (3, 6)
    run(trainer.run, *layout, resumed)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    assert len(metrics(tmp_path / "straight")) == 8
    states = [
        json.loads((StageFolder(tmp_path / name).checkpoint(8) / "state.json").read_text())
        for name in ("resumed", "straight")
    ]
    assert all(state.pop("wall_seconds") > 0 for state in states) and states[0] == states[1]
    if stage in ("ppo", "grpo"):
        assert states[0]["kl_coef"] != make(tmp_path, **settings).kl_coef
    for model in learners:
        assert tensors(tmp_path / "resumed", 8, model) == tensors(tmp_path / "straight", 8, model)


def test_a_resume_takes_the_rates_and_the_kl_coefficient_of_the_configuration(small_run, tmp_path):
    """``resume --set ppo.lr=...``: what the checkpoint holds of them are the old ones."""
    old = dict(
        rollout_batch_size=8, response_length=4, iterations=4, lr=1e-4, value_lr=2e-4, kl_coef=0.1, schedule="linear"
    )
    new = old | {"lr": 1e-3, "value_lr": 4e-3, "min_lr": 1e-5, "kl_coef": 0.5}
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "new", **new))
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "old", **old, save_every=2))
    shutil.rmtree(StageFolder(tmp_path / "old").checkpoint(4))
    (tmp_path / "old" / "latest").write_text("2")
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "old", **new))
    for name in ("lr", "value_lr", "kl_coef"):
        resumed, straight = (
            [json.loads(row)[name] for row in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
            for stage in ("old", "new")
        )
        assert resumed[:2] != straight[:2] and resumed[2:] == straight[2:], name


def test_a_policy_that_has_made_no_step_is_saved_and_resumed(small_run, tmp_path):
    """With the small optimizer; test_resumed_equals_uninterrupted_bit_for_bit does it with
    fp32's."""
    settings = dict(
        rollout_batch_size=8,
        response_length=4,
        iterations=3,
        value_warmup=2,
        precision="bf16",
        optimizer_precision="bf16",
        keep_checkpoints=3,
    )
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "straight", **settings))
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "resumed", **settings, save_every=1))
    for iteration in (2, 3):
        shutil.rmtree(StageFolder(tmp_path / "resumed").checkpoint(iteration))
    (tmp_path / "resumed" / "latest").write_text("1")
    run(ppo.run, 1, 1, 1, small_run.ppo(tmp_path / "resumed", **settings, save_every=1))
    assert tensors(tmp_path / "resumed", 3, "policy") == tensors(tmp_path / "straight", 3, "policy")
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")


@pytest.mark.parametrize("trainer", [ppo, grpo])
def test_a_run_that_began_before_values_had_a_bias_goes_on_without_one(small_run, tmp_path, trainer):
    make = {ppo: small_run.ppo, grpo: small_run.grpo}[trainer]
    run(trainer.run, 1, 1, 1, make(tmp_path, iterations=1, response_length=4))
    saved = StageFolder(tmp_path).checkpoint(1)
    state = json.loads((saved / "state.json").read_text())
    del state["value_bias"]
    (saved / "state.json").write_text(json.dumps(state))
    checksums.write(saved)
    run(trainer.run, 1, 1, 1, make(tmp_path, iterations=2, response_length=4))
    resumed = json.loads((StageFolder(tmp_path).checkpoint(2) / "state.json").read_text())
    assert resumed["iteration"] == 2 and resumed["value_bias"] == 0


def kill_after_3(trainer, config, seed: str) -> None:
    """The trainer; one rank is killed at a moment between the checkpoint of iteration 3 and, at the
    speed of the second, the end of 7."""
    draw, end, ends = random.Random(seed), Boundary.end, []
    victim, iterations = draw.randrange(dist.get_world_size()), draw.uniform(0, 4)

    def end_and_start_the_clock(self, iteration, *args):
        if iteration == 8:  # it was faster than estimated
            os.kill(os.getpid(), signal.SIGKILL)
        is_finished = end(self, iteration, *args)
        ends.append(time.monotonic())
        if iteration == 3:
            self.saver.wait()
            if dist.get_rank() == victim:
                threading.Timer(iterations * (ends[1] - ends[0]), os.kill, (os.getpid(), signal.SIGKILL)).start()
        return is_finished

    Boundary.end = end_and_start_the_clock
    trainer.run(config)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True], ids=["a new iteration", "an iteration that is there"])
def test_a_kill_before_any_step_of_publishing_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """Random kills (test_saving) rarely hit the microseconds between two renames; here every one is
    a place to die."""

    def save(stage, iteration, text):
        aside = StageFolder(stage).checkpoint(iteration).with_name(".saving")
        aside.mkdir(parents=True)
        (aside / "state.json").write_text(text)
        StageFolder(stage).publish(aside, iteration)

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
            for owner, name in (
                (os, "replace"),
                (atomic, "sync"),
                (shutil, "rmtree"),
                (Path, "unlink"),
                (Path, "write_text"),
            ):
                patch.setattr(owner, name, dying(getattr(owner, name)))
            aside = StageFolder(stage).checkpoint(1 if again else 2).with_name(".saving")
            aside.mkdir()
            with open(aside / "state.json", "w") as file:
                file.write("new")
            try:
                StageFolder(stage).publish(aside, 1 if again else 2)
                survived = True
            except Killed:
                pass
        latest = StageFolder(stage).latest()
        if latest is None:
            assert again, "only a checkpoint that replaces the newest may leave none for a moment"
            continue
        checksums.check(StageFolder(stage).checkpoint(latest))
        text = (StageFolder(stage).checkpoint(latest) / "state.json").read_text()
        assert text in ("old", "new") and (latest == 1 or text == "new")
    assert place > 8 and latest == (1 if again else 2) and text == "new"


def stop_after(trainer, config, iteration):
    """The trainer, ended without any clean-up as soon as ``iteration`` is saved."""
    save = Saver.save

    def save_and_die(self, number, state, best):
        save(self, number, state, best)
        if number == iteration:
            self.wait()
            raise Killed

    Saver.save = save_and_die
    try:
        trainer.run(config)
    except Killed:
        return


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_resume_at_another_layout_goes_on_with_equal_losses(small_run, tmp_path, stage):
    """Saved at TP 2 x PP 1, resumed at TP 1 x PP 2 x DP 2: the rest of the losses equal to
    rounding, Adam's moments included."""
    make, trainer, names, values = {
        "sft": (small_run.sft, sft, ("loss", "grad_norm"), {}),
        "ppo": (small_run.ppo, ppo, ("policy_loss", "value_loss", "grad_norm", "kl", "reward", "kl_coef"), PPO),
    }[stage]
    settings = dict(iterations=4, save_every=2, **values)
    run(trainer.run, 1, 1, 1, make(tmp_path / "straight", **settings))
    run(stop_after, 2, 1, 1, trainer, make(tmp_path / "moved", layout=(2, 1), **settings), 2)
    run(trainer.run, 1, 2, 2, make(tmp_path / "moved", layout=(1, 2), **settings))
    for row, expected in zip(metrics(tmp_path / "moved"), metrics(tmp_path / "straight"), strict=True):
        for name in names:
            tolerance = 1e-5 if name == "loss" else 1e-4 if stage == "sft" else 1e-3
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=2e-5 if stage == "ppo" else None), name


def test_a_checkpoint_is_read_again_only_when_it_was_touched(small_run, tmp_path, monkeypatch):
    shutil.copytree(small_run.folder / "sft", tmp_path / "sft")
    folder, hashed = StageFolder(tmp_path / "sft").resolve(), []
    digest = checksums.digest
    monkeypatch.setattr(checksums, "digest", lambda path: hashed.append(path) or digest(path))

    def twice_and_once_damaged():
        format.verify(folder, "model")
        first = len(hashed)
        format.verify(folder, "model")
        assert first == len(hashed) > 3
        path = folder / "model" / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        with pytest.raises(Damaged, match="__0_0"):
            format.verify(folder, "model")
        assert hashed[first:] == [path]

    run(twice_and_once_damaged, 1, 1, 1)


def test_what_decides_a_checkpoint_s_tensors_can_t_be_changed_half_way(small_run, tmp_path):
    """Other adapters or another optimizer: an error that names key and values, not a tensor's."""
    settings = dict(iterations=2, precision="bf16")
    run(stop_after, 1, 1, 1, sft, small_run.sft(tmp_path, **settings, lora_rank=4, save_every=1), 1)
    for change, message in (
        ({"lora_rank": 8}, "lora_rank = 8, but .*iter_0000001 was made with lora_rank = 4"),
        ({}, "lora_rank = 0, but"),
        ({"lora_rank": 4, "optimizer_precision": "bf16"}, "optimizer_precision = 'bf16', but .* = 'fp32'"),
        ({"lora_rank": 4, "precision": "fp32"}, "precision = 'fp32', but .* was made with precision = 'bf16'"),
    ):
        with pytest.raises(AssertionError, match=f"ConfigError: {message}"):
            run(sft.run, 1, 1, 1, small_run.sft(tmp_path, **settings | change))


def test_another_family_s_model_is_refused_by_its_name(family_run, tmp_path):
    run(stop_after, 1, 1, 1, sft, family_run("bloom").sft(tmp_path, iterations=2, save_every=1), 1)
    with pytest.raises(
        AssertionError, match="ConfigError: model_type = 'llama', but .*iter_0000001 was made with model_type = 'bloom'"
    ):
        run(sft.run, 1, 1, 1, family_run("llama").sft(tmp_path, iterations=2))


@pytest.mark.parametrize("saved", [[1], [1, 2]])
def test_checkpoints_without_latest_are_not_overwritten_from_scratch(small_run, tmp_path, saved):
    """A copy of the folder without that file, or someone's rm: the error says what to do, and that
    works."""
    config = small_run.sft(tmp_path, iterations=3, save_every=1, keep_checkpoints=5)
    run(stop_after, 1, 1, 1, sft, config, saved[-1])
    (tmp_path / "latest").unlink()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(AssertionError, match=r"latest is missing, but present: 1.*echo \d > .*latest.*another --name"):
        run(sft.run, 2, 1, 1, small_run.sft(tmp_path, layout=(2, 1), iterations=3))
    assert (tmp_path / "metrics.jsonl").read_text() == before and StageFolder(tmp_path).iterations() == saved
    (tmp_path / "latest").write_text(f"{saved[-1]}\n")
    run(sft.run, 1, 1, 1, config)
    assert [row["iteration"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_a_kill_between_the_first_checkpoint_and_latest_loses_nothing(small_run, tmp_path, capfd):
    config = small_run.sft(tmp_path, iterations=2, save_every=1)
    run(stop_after, 1, 1, 1, sft, config, 1)
    os.replace(tmp_path / "latest", tmp_path / "latest.pending")  # what such a kill leaves
    run(sft.run, 1, 1, 1, config)
    assert "resumed from iteration 1" in capfd.readouterr().out and StageFolder(tmp_path).latest() == 2


def test_a_finished_stage_has_nothing_left_to_do(small_run, tmp_path, capfd):
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    before = metrics(tmp_path)
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    assert "nothing left to do" in capfd.readouterr().out and metrics(tmp_path) == before


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (65, r"model/__0_0\.distcp .* does not have the sha256", "refused"),
        (74, "failed on rank 0: .*File too large", "disk full"),
        (73, "failed on rank 0: .*Permission denied", "file error"),
    ],
)
def test_exit_code_tells_a_damaged_checkpoint_from_a_failed_save(small_run, tmp_path, capfd, code, message, kind):
    """One line, not a traceback; the checkpoint before is named. The last words are those of the
    exit code."""
    run(sft.run, 1, 1, 1, small_run.sft(tmp_path, iterations=2))
    config = small_run.sft(tmp_path, iterations=3)
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))

    def stage():
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(21000 + os.getpid() % 9000),
        )
        os.environ["CONVOY_WORDS"] = str(tmp_path / "errors")
        sys.argv = ["sft", str(tmp_path / "config.json")]
        if code == 73:
            Saver._make_folders = lambda *_: _raise(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
        if code == 74:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        os._exit(run_stage(SFTConfig, sft.run))

    if code == 65:
        with open(StageFolder(tmp_path).resolve() / "model" / "__0_0.distcp", "r+b") as file:
            file.seek(1000)
            file.write(b"damage")
    process = multiprocessing.get_context("fork").Process(target=stage)
    process.start()
    process.join(60)
    shown = capfd.readouterr().err
    assert (
        process.exitcode == code and re.search(f"^error: .*{message}", shown, re.MULTILINE) and "Traceback" not in shown
    ), shown
    assert StageFolder(tmp_path).latest() == 2
    report = json.loads((tmp_path / "errors/rank_0.json").read_text())
    assert report["class"] == kind and re.search(message, report["message"])


def _raise(error):
    raise error


def start(module: str, config, world: int) -> list[subprocess.Popen]:
    """The stage's real command line, one process a rank."""
    folder = Path(config.paths.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    port = str(20000 + os.getpid() % 10000)
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(folder / "config.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            },
        )
        for rank in range(world)
    ]


def test_term_saves_at_the_step_boundary_and_asks_to_go_on(small_run, tmp_path):
    """TERM at one rank: both save the same iteration, wait until it is written, and exit 75
    (EX_TEMPFAIL)."""
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
    saved = StageFolder(tmp_path).latest()
    assert StageFolder(tmp_path).iterations() == [saved] and metrics(tmp_path)[-1]["iteration"] == saved
