"""What the reward model says of itself on held-out pairs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from tests.support.distributed import run
from tests.support.ppo_reference import Scalar
from tests.support.ppo_weights import weights
from training import reward
from training.checkpoint.stage_folder import StageFolder
from training.data.tokenizer import Tokenizer
from training.generation.request import draws
from training.models.heads import ScalarHead
from training.rl import reward_bias
from training.trainer import reward_metrics


def test_calibration_equals_a_loop_over_pairs():
    margins = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 2
    # as two ranks add up
    found = reward_metrics.calibration(
        reward_metrics.calibration_sums(margins[:200]) + reward_metrics.calibration_sums(margins[200:])
    )
    bins = {edge: [] for edge in reward_metrics.CONFIDENCE}
    for margin in margins.tolist():
        confidence = 1 / (1 + math.exp(-abs(margin)))
        bins[max(edge for edge in bins if edge <= confidence)].append((margin > 0, confidence))
    error = sum(abs(sum(right - confidence for right, confidence in pairs)) for pairs in bins.values()) / len(margins)
    assert found["heldout_calibration_error"] == pytest.approx(error, abs=1e-4)
    for edge, pairs in bins.items():
        assert found[f"heldout_accuracy_at_{edge}"] == pytest.approx(sum(right for right, _ in pairs) / len(pairs))


def test_interval_of_a_proportion():
    """Wilson's own formula at 8 of 10 (e.g. Brown, Cai and DasGupta 2001): 0.490 to 0.943."""
    assert reward_metrics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_interval_of_a_mean():
    margins = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.double) + 0.4
    error = margins.std().item() / 300**0.5
    low, high = reward_metrics.mean_interval(300, margins.sum().item(), margins.square().sum().item())
    assert (low, high) == pytest.approx(
        (margins.mean().item() - 1.96 * error, margins.mean().item() + 1.96 * error), abs=1e-4
    )
    assert math.isnan(reward_metrics.mean_interval(1, 2.0, 4.0)[0])


def new_head() -> tuple[torch.Tensor, torch.Tensor]:
    config = SimpleNamespace(hidden_size=8192, sequence_parallel=False, params_dtype=torch.float32)
    head = ScalarHead(config, None)
    head.initialise(3)
    return head.linear.weight.detach(), head.linear.bias.detach()


def test_a_new_head_is_drawn_from_the_stated_distribution():
    """N(0, 1 / sqrt(hidden + 1)), bias 0; the same on every rank, whatever its random state."""
    (weight, bias), other = run(new_head, 1, 1, 2)
    assert torch.equal(weight, other[0]) and bias.tolist() == [0.0]
    assert weight.std().item() == pytest.approx(8193**-0.5, rel=0.03) and abs(weight.mean().item()) < 4 / 8193
    # normal: 0.683; uniform of this deviation: 0.577
    assert 0.65 < (weight.abs() < 8193**-0.5).double().mean().item() < 0.72


def test_length_bias_by_hand():
    """Two queries; of the second, one reply only fills up the row, and two scores are equal."""
    nan = math.nan
    rewards, lengths = torch.tensor([[2.0, 1.0, 0.0], [5.0, 3.0, 9.0]]), torch.tensor([[4, 6, 2], [8, 8, 99]])
    scores = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, nan]])
    found = reward_metrics.length_bias(reward_metrics.length_sums(rewards, scores, lengths))
    # Pairs (better, worse) by length: (4, 6) right, shorter; (2, 4) and (2, 6) wrong, shorter; none
    # longer.
    assert found["heldout_accuracy_shorter"] == pytest.approx(1 / 3) and "heldout_accuracy_longer" not in found
    real = torch.tensor([[2.0, 1.0, 0.0, 5.0, 3.0], [4, 6, 2, 8, 8]])
    assert found["heldout_length_correlation"] == pytest.approx(torch.corrcoef(real)[0, 1].item())
    flat = reward_metrics.length_bias(
        reward_metrics.length_sums(torch.ones(1, 2), torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 4]]))
    )
    assert flat["heldout_length_correlation"] == 0.0


def test_with_the_stored_bias_the_sft_policy_s_responses_score_zero(small_run, tmp_path):
    """Scored and, the first of them, sampled again by Hugging Face's models; the same at another
    layout, and not sampled twice."""
    config = small_run.reward(tmp_path / "one", iterations=2, save_every=1)
    run(reward.run, 1, 1, 1, config)
    said = json.loads((tmp_path / "one" / reward_bias.RESPONSES).read_text())["responses"]
    body, head = run(weights, 1, 1, 1, config, config.paths.output, "scalar")[0]
    judge = Scalar(BloomConfig.from_pretrained(small_run.model), body, *head).eval()
    eos = Tokenizer(small_run.model).eos_id
    with torch.no_grad():
        scores = [judge(tokens)[-1].item() for tokens, _ in said if tokens[-1] == eos]
    bias = reward_bias.stored(StageFolder(config.paths.output).resolve())
    assert len(said) == 40 and len(scores) > 30
    assert sum(scores) / len(scores) + bias == pytest.approx(0, abs=1e-4) and abs(bias) > 1e-3
    assert reward_bias.stored(StageFolder(config.paths.output).resolve(1)) != bias

    sft, _ = run(weights, 1, 1, 1, config, config.paths.init, "lm")[0]
    policy = BloomForCausalLM(BloomConfig.from_pretrained(small_run.model)).eval()
    policy.transformer.load_state_dict(sft)
    policy.tie_weights()
    for (tokens, start), uniforms in list(zip(said, draws(config.seed, 0, 40, 40), strict=True))[:5]:
        with torch.no_grad():
            odds = policy(torch.tensor([tokens])).logits[0, start - 1 : -1].softmax(-1).cumsum(-1)
        drawn = (odds <= (uniforms[: len(odds)] * odds[:, -1])[:, None]).sum(-1)
        assert drawn.tolist() == tokens[start:]

    asked = tmp_path / "two" / reward_bias.RESPONSES
    asked.parent.mkdir()
    asked.write_bytes((tmp_path / "one" / reward_bias.RESPONSES).read_bytes())
    touched = asked.stat().st_mtime_ns
    run(reward.run, 1, 2, 2, small_run.reward(tmp_path / "two", layout=(1, 2), iterations=2, micro_batch_size=1))
    assert asked.stat().st_mtime_ns == touched
    assert reward_bias.stored(StageFolder(tmp_path / "two").resolve()) == pytest.approx(bias, rel=1e-3)


@pytest.mark.parametrize(
    ("layout", "values"), [((2, 1, 1), {"sequence_parallel": True}), ((1, 2, 2), {"micro_batch_size": 1})]
)
def test_packed_training_equals_unpacked_training(small_run, tmp_path, layout, values):
    """Two, three or four replies to a query, some with equal scores; rows of a seq_length that
    holds one reply, not all of a query's."""
    with open(small_run.data("reward")) as file:
        lines = [json.loads(line) for line in file][:48]
    for number, line in enumerate(lines):
        for more in range(number % 3):
            line["response"].append(lines[number - more - 1]["response"][0])
            line["score"].append(line["score"][0] if more else 0.5)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {}
    for packing in (True, False):
        settings = dict(layout=layout[:2], iterations=4, packing=packing, calibration_samples=0, **values)
        config = small_run.reward(tmp_path / str(packing), **settings)
        object.__setattr__(config, "seq_length", 48)
        object.__setattr__(config.paths, "train", str(train))
        run(reward.run, *layout, config)
        found[packing] = [
            json.loads(line) for line in (tmp_path / str(packing) / "metrics.jsonl").read_text().splitlines()
        ]
    for packed, alone in zip(found[True], found[False], strict=True):
        for name, tolerance in (("loss", 1e-5), ("margin", 1e-4), ("accuracy", 1e-5), ("grad_norm", 1e-4)):
            assert packed[name] == pytest.approx(alone[name], rel=tolerance, abs=1e-6), name
        assert packed["tokens"] == alone["tokens"] and packed["packing_efficiency"] > alone["packing_efficiency"]
    assert found[True][-1]["heldout_margin"] == pytest.approx(found[False][-1]["heldout_margin"], rel=1e-3)


def test_heldout_numbers_are_the_same_on_two_data_parallel_ranks(small_run, tmp_path):
    for data in (1, 2):
        run(reward.run, 1, 1, data, small_run.reward(tmp_path / str(data), iterations=2, eval_every=2))
    one, two = (
        [json.loads(line) for line in (tmp_path / str(data) / "metrics.jsonl").read_text().splitlines()][-1]
        for data in (1, 2)
    )
    names = [name for name in one if name.startswith("heldout_") or name == "shorter_wins"]
    assert "heldout_calibration_error" in names and "heldout_accuracy_at_0.5" in names
    assert one["heldout_margin_low"] < one["heldout_margin"] < one["heldout_margin_high"]
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=1e-4)
