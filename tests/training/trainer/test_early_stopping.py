"""Early stop, and replies in the log: the rule by hand, the stage's end, the checkpoint that later
stages get, the resume."""

import json
import math
import os
import signal

import pytest

from tests.support.distributed import run
from training import sft
from training.checkpoint.stage_folder import CHOSEN, StageFolder
from training.config.schema import build
from training.config.trainers import SFTConfig
from training.data.cache import TokenRows, cached
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError, Interrupted
from training.metrics.metrics import Metrics
from training.trainer.early_stopping import EarlyStop


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def numbers(stage) -> list[dict]:
    return [
        {
            name: value
            for name, value in row.items()
            if "second" not in name and name not in ("time", "save_s", "save_stall_s")
        }
        for row in rows(stage)
    ]


def test_the_rule_by_hand():
    stop = EarlyStop(2, 0.1, "heldout_loss")
    assert [stop.update(at, value) for at, value in enumerate([3.0, 2.95, 2.89, 2.85, 2.8], 1)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert stop.over and stop.iteration == 3
    resumed = EarlyStop(2, 0.1, "heldout_loss")
    resumed.load_state_dict(json.loads(json.dumps(stop.state_dict())))
    assert resumed == stop
    never = EarlyStop(1, 0.0, "x")
    assert not never.update(1, math.nan) and not never.over


def until_told(config: SFTConfig) -> bool:
    try:
        sft.run(config)
    except Interrupted:
        return True
    return False


@pytest.mark.parametrize("layout", [(1, 2, 2)])
def test_training_ends_when_the_heldout_loss_rises_and_the_best_is_used(
    small_run, tmp_path, monkeypatch, capfd, layout
):
    """With a rate at which it goes up and down; once straight, once told to stop after the first
    evaluation that was no better."""

    def config(name: str):
        made = small_run.sft(
            tmp_path / name,
            layout=layout[:2],
            iterations=30,
            eval_every=1,
            lr=0.03,
            schedule="constant",
            patience=2,
            micro_batch_size=1,
            keep_checkpoints=1,
        )
        object.__setattr__(made.paths, "init", str(small_run.folder / "convert"))
        return made

    run(sft.run, *layout, config("straight"))
    losses = [row["heldout_loss"] for row in rows(tmp_path / "straight")]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 30, losses
    assert StageFolder(tmp_path / "straight").latest() == best and StageFolder(tmp_path / "straight").iterations() == [
        best,
        best + 2,
    ]
    said = json.loads((tmp_path / "straight" / CHOSEN).read_text())
    assert (said["iteration"], said["ended"], said["best"]) == (best, best + 2, min(losses))
    assert (
        f"ended at iteration {best + 2} (no better for 2 evaluations); iteration {best} is used"
        in capfd.readouterr().out
    )
    run(sft.run, *layout, config("straight"))
    assert "nothing left to do" in capfd.readouterr().out and len(rows(tmp_path / "straight")) == best + 2

    log = Metrics.log

    def logged(self, iteration, *args, **values):
        log(self, iteration, *args, **values)
        if iteration == best:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Metrics, "log", logged)
        assert all(run(until_told, *layout, config("twice")))
    assert StageFolder(tmp_path / "twice").latest() == best + 1 and not (tmp_path / "twice" / CHOSEN).exists()
    run(sft.run, *layout, config("twice"))
    assert numbers(tmp_path / "twice") == numbers(tmp_path / "straight")
    assert json.loads((tmp_path / "twice" / CHOSEN).read_text()) == said
    assert StageFolder(tmp_path / "twice").latest() == best


def test_a_choice_holds_only_for_its_own_rule(tmp_path):
    stop = EarlyStop(2, 0.0, "heldout_loss", best=1.0, iteration=3, misses=1)
    folder = StageFolder(tmp_path)
    folder.choose(3, stop.record(8))
    record = folder.chosen()
    assert record["ended"] == 8 and folder.latest() == 3
    assert stop.still_holds(record, 8)
    # more iterations are configured, and patience had not run out
    assert not stop.still_holds(record, 9)
    assert not EarlyStop(3, 0.0, "heldout_loss").still_holds(record, 8)
    folder.set_latest(2)  # --load-iteration 2
    assert folder.chosen() is None
    folder.withdraw_choice()
    assert not (tmp_path / CHOSEN).exists()


@pytest.mark.parametrize(
    ("layout", "values"), [((1, 1, 1), {}), ((2, 1, 1), {"sequence_parallel": True}), ((1, 2, 2), {})]
)
def test_replies_to_heldout_prompts_are_in_the_log(small_run, tmp_path, capfd, layout, values):
    """The same on every layout, every second iteration, and as TensorBoard's text; they change no
    number."""
    config = small_run.sft(
        tmp_path, layout=layout[:2], iterations=4, sample_every=2, sample_prompts=3, sample_length=8, lr=1e-5, **values
    )
    object.__setattr__(config.paths, "init", str(small_run.folder / "sft"))
    run(sft.run, *layout, config)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  sample: ")]
    tokenizer = Tokenizer(small_run.model)
    unseen = TokenRows(cached(small_run.data("sft_heldout"), "sft", tokenizer))
    assert len(lines) == 6
    for line, row in zip(lines, list(unseen)[:3] * 2, strict=False):
        assert line.startswith(f"  sample: {tokenizer.decode(row.prompt)!r} -> ")
    first = small_run.folder / "samples.json"
    if not first.exists():
        first.write_text(json.dumps(lines))
    assert lines == json.loads(first.read_text())
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"samples/text_summary" in events


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patience": -1}, "sft.patience = -1: expected at least 0"),
        ({"sample_prompts": 0}, "sft.sample_prompts = 0: expected at least 1"),
    ],
)
def test_bad_values_say_what_was_expected(values, message):
    with pytest.raises(ConfigError, match=message):
        build(SFTConfig, {"paths": dict.fromkeys(("output", "model", "init", "train", "heldout"), ""), **values}, "sft")
