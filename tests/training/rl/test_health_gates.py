"""Gates count breaches; a bad update leaves no trace; a pause is saved and goes on."""

import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
from dataclasses import asdict

import pytest
import torch

from tests.support.distributed import run
from tests.support.learners import SHAPE, held
from tests.support.ppo_settings import settings as ppo_settings
from training import ppo
from training.checkpoint.stage_folder import StageFolder
from training.config.trainers import PPOConfig
from training.data.batches import Example, collate
from training.errors import Unhealthy
from training.main import run_stage
from training.models.heads import next_token_logprobs
from training.rl.health_gates import Gates
from training.trainer.step import Learner, Objective, build_model, split
from training.trainer.update_guard import YOUNG, Guard

HEALTHY = {
    "kl": 1.0,
    "kl_k3": 1.0,
    "eos_rate": 0.9,
    "explained_variance": 0.3,
    "value_offset": -9.0,
    "reward_length_correlation": 0.5,
    "entropy": 0.4,
}


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("kl", 101.0, "KL to the reference, nats per response = 101, kl_max = 100"),
        ("kl", math.nan, "kl_max"),
        ("eos_rate", 0.0, "eos_rate_min"),
        ("explained_variance", -1001.0, "explained_variance_min"),
        ("value_offset", -10.5, "|mean of return - value| = 10.5, value_offset_max = 10"),
        ("value_offset", math.nan, "value_offset_max"),
        ("reward_length_correlation", 0.99, "length_correlation_max"),
        ("entropy", 0.009, "entropy, nats per token = 0.009, entropy_min = 0.01"),
        ("kl_k3", 0.0, "the KL to the reference is exactly 0"),
        ("token_mult_prob_error", 1.2, "mean of exp |log p - log p_rollout| = 1.2, mult_prob_error_max = 1.1"),
    ],
)
def test_a_gate_warns_then_pauses_then_stops(metric, value, words):
    gates = Gates(ppo_settings(gate_after=2, gate_pause=3, gate_stop=5, value_warmup=1))
    bad = HEALTHY | {metric: value}
    assert gates.judge(3, bad) == ([], ""), "value_warmup + gate_after iterations are not judged"
    assert gates.judge(4, HEALTHY) == ([], "")
    for iteration in (5, 6):
        (warning,), pause = gates.judge(iteration, bad)
        assert words in warning and not pause
    assert gates.judge(7, HEALTHY) == ([], ""), "a good iteration begins the count again"
    assert [bool(gates.judge(iteration, bad)[1]) for iteration in (8, 9, 10)] == [False, False, True]
    resumed = Gates(gates.config)
    resumed.load_state_dict(json.loads(json.dumps(gates.state_dict())))
    assert resumed.judge(11, bad)[1] == "", "one pause, then the count goes on"
    with pytest.raises(Unhealthy, match="stopped by a health gate at iteration 12.*5 iterations in a row; not saved"):
        resumed.judge(12, bad)


def test_a_gate_that_an_earlier_version_did_not_have_counts_from_0():
    gates = Gates(ppo_settings(gate_after=0))
    gates.load_state_dict({"reference": 0, "kl_max": 2})
    warnings, _ = gates.judge(1, HEALTHY | {"value_offset": 11.0, "kl": 101.0})
    assert [words.rsplit(", ", 1)[1] for words in warnings] == ["3 iterations in a row", "1 iterations in a row"]


def test_absent_metrics_are_not_judged():
    gates = Gates(ppo_settings(gate_after=0))
    assert gates.judge(1, {"kl": 1.0, "kl_k3": 1.0, "eos_rate": 1.0}) == ([], "")


def test_spikes_and_nan_are_skipped_then_stop():
    guard = Guard(ppo_settings(grad_spike=10.0, skip_updates=2))
    assert guard.admits({"loss": 1.0}, 1.0) and guard.admits({"loss": 1.0}, 50.0), "too early to call it a spike"
    for _ in range(YOUNG):
        assert guard.admits({"loss": 1.0}, 1.0)
    assert guard.mean == pytest.approx(0.98 ** (YOUNG + 1) + 50 * 0.02 * 0.98**YOUNG + 1 - 0.98**YOUNG), (
        "the first, then a decaying mean"
    )
    for loss, norm in ((1.0, 500.0), (math.nan, 1.0)):
        assert not guard.admits({"loss": loss}, norm)
    again = Guard(guard.trainer)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert guard.admits({"loss": 1.0}, 1.0) and guard.skipped == 0
    with pytest.raises(
        FloatingPointError,
        match=r"not finite: \{'loss': 1.0, 'grad_norm': inf\}; 3 updates in a row \(skip_updates = 2\)",
    ):
        again.admits({"loss": 1.0}, math.inf)


def trace(learner: Learner) -> str:
    """sha256 of weights, optimizer and schedule of this rank."""
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in learner.optimizer.param_groups
    ]
    counts = [float(state["step"]) for state in learner.optimizer.optimizer.state.values() if "step" in state]
    digest = hashlib.sha256(repr((learner.schedule.num_steps, groups, counts)).encode())
    for tensor in held(learner):
        digest.update(tensor.data.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def steps(config: PPOConfig, bad: str) -> tuple[list[str], list[float]]:
    """A good step, a bad one, a good one -> this rank's trace after each, and the numbers of
    skipped updates."""
    model = build_model(SHAPE, config, "lm")
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    learner = Learner(model, config, 1e-3, 10, 0)
    generator = torch.Generator().manual_seed(1)
    batch = split(
        collate([Example(torch.randint(0, 300, (16,), generator=generator).tolist(), 4) for _ in range(2)], 0, 16), 1
    )

    def objective(kind: str) -> Objective:
        def compute(output, micro):
            loss = -next_token_logprobs(output, micro["tokens"], mask=micro["response_mask"]).sum()
            worst = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            # 1e30: the norm's square overflows
            factor = {"gradient": 1e30, "loss": math.nan}[kind] if kind and worst else 1.0
            return loss * factor, micro["response_mask"].sum(), loss[None] * (factor if kind == "loss" else 1.0)

        return Objective(("loss",), compute)

    made = [(learner.step(batch, objective(kind))["skipped_updates"], trace(learner)) for kind in ("", bad, "")]
    return [hashed for _, hashed in made], [skipped for skipped, _ in made]


@pytest.mark.parametrize(
    ("layout", "values", "bad"),
    [
        ((1, 1, 2), {}, "loss"),
        ((2, 2, 1), {"sequence_parallel": True}, "gradient"),
        ((1, 2, 1), {"precision": "bf16", "optimizer_precision": "bf16"}, "loss"),
    ],
)
def test_a_skipped_update_changes_nothing_on_any_rank(layout, values, bad):
    """The last rank alone sees the bad number; all leave out the same update, bit for bit."""
    config = ppo_settings(tensor_parallel=layout[0], pipeline_parallel=layout[1], **values)
    for (first, second, third), skipped in run(steps, *layout, config, bad):
        assert skipped == [0.0, 1.0, 0.0] and first == second != third


def stage(config: str) -> None:
    """The stage as a process of its own: ``run_stage``'s exit code."""
    port = str(21000 + os.getpid() % 9000)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.argv = ["ppo", config]
    os._exit(run_stage(PPOConfig, ppo.run))


def test_a_pause_is_saved_ends_with_76_and_goes_on(small_run, tmp_path, capfd):
    """One update a rollout of two tokens: no response ends. Iterations 1 and 2 warn, 2 pauses;
    resumed, 3 is warned of and 4 stops."""
    config = small_run.ppo(
        tmp_path,
        iterations=6,
        response_length=2,
        rollout_batch_size=8,
        gate_after=0,
        gate_pause=2,
        gate_stop=4,
        eos_rate_min=1.0,
        explained_variance_min=-1e9,
    )
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    for said, saved in (
        ("paused by a health gate: .*eos_rate_min = 1, 2 iterations in a row; iteration 2 is saved", 2),
        ("stopped by a health gate at iteration 4: .*not saved", 2),
    ):
        process = multiprocessing.get_context("fork").Process(target=stage, args=(str(tmp_path / "config.json"),))
        process.start()
        process.join(60)
        shown = capfd.readouterr()
        assert process.exitcode == 76 and re.search(f"^error: {said}", shown.err, re.MULTILINE), shown.err
        assert "warning: iteration" in shown.out
        assert StageFolder(tmp_path).latest() == saved
    assert [json.loads(line)["gates_breached"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        1,
        1,
        1,
    ]
