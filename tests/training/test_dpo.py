"""DPO beside plain torch on Hugging Face's model, and over layouts."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.distributed import run
from tests.support.ppo_weights import weights
from training import dpo, losses
from training.config.schema import build
from training.config.trainers import DPOConfig
from training.data.batches import Sampler, comparison_example
from training.data.rows import parse
from training.data.tokenised import TextTokenizer
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError


def rows(stage) -> list[dict]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def data(small_run, name: str) -> list[dict]:
    with open(small_run.data(name)) as file:
        return [json.loads(line) for line in file]


def plain(config: DPOConfig, sft: dict) -> list[dict]:
    """The stage once more: one process, one unpadded reply at a time, a frozen second model, one
    pair after the other."""
    shape = AutoConfig.from_pretrained(config.paths.model)
    policy, frozen = (AutoModelForCausalLM.from_config(shape).eval() for _ in range(2))
    for model in (policy, frozen):
        model.base_model.load_state_dict(sft)
        model.tie_weights()
    tokenizer = Tokenizer(config.paths.model)
    with open(config.paths.train) as file:
        data = [json.loads(line) for line in file]
    sampler, made = Sampler(len(data), config.global_batch_size, config.seed), []
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), weight_decay=0.0
    )

    def logprob(model, example):
        odds = model(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1)
        chosen = odds[torch.arange(len(odds)), torch.tensor(example.tokens[1:])]
        return chosen[example.response_start - 1 :].sum()

    for _ in range(config.iterations):
        queries = []
        for index in sampler.next_batch():
            (row,) = TextTokenizer(tokenizer).tokenise([parse(data[index])], "reward")
            replies = comparison_example(row, config.seq_length)
            with torch.no_grad():
                reference = [logprob(frozen, example) for example, _ in replies]
            ratios = [
                (logprob(policy, example) - base, score)
                for (example, score), base in zip(replies, reference, strict=True)
            ]
            pairs = [(first, second) for first, better in ratios for second, worse in ratios if better > worse]
            margins = torch.stack([config.beta * (first - second) for first, second in pairs])
            if config.loss == "ipo":
                loss = ((margins / config.beta - 0.5 / config.beta) ** 2).mean()
            else:
                loss = -(
                    (1 - config.label_smoothing) * F.logsigmoid(margins)
                    + config.label_smoothing * F.logsigmoid(-margins)
                ).mean()
            queries.append(
                {
                    "loss": loss,
                    "accuracy": (margins > 0).float().mean(),
                    "margin": margins.mean(),
                    "chosen_reward": config.beta * torch.stack([first for first, _ in pairs]).mean(),
                    "rejected_reward": config.beta * torch.stack([second for _, second in pairs]).mean(),
                }
            )
        means = {name: torch.stack([query[name] for query in queries]).mean() for name in queries[0]}
        optimizer.zero_grad()
        means["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.clip_grad)
        optimizer.step()
        made.append({**{name: value.item() for name, value in means.items()}, "grad_norm": norm.item()})
    return made


@pytest.mark.parametrize("values", [{"label_smoothing": 0.1}, {"loss": "ipo", "beta": 0.5}], ids=["sigmoid", "ipo"])
@pytest.mark.parametrize("family", ["bloom", "qwen2", "qwen3"])
def test_steps_equal_plain_torch_with_hugging_face(family_run, tmp_path, family, values):
    """Also with three replies to a query, two of which may have equal scores."""
    small_run = family_run(family)
    lines = data(small_run, "reward")[:40]
    for number, line in enumerate(lines[:20]):
        line["response"].append(lines[number + 1]["response"][0])
        line["score"].append(line["score"][0] if number % 2 else 7.5)
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = dict(iterations=6, schedule="constant", **values)
    config = small_run.dpo(tmp_path, **settings)
    object.__setattr__(config.paths, "train", str(train))
    moved = small_run.dpo(tmp_path, layout=(1, 2), **settings)
    object.__setattr__(moved.paths, "train", str(train))
    run(dpo.run, 1, 2, 1, moved)
    sft, _ = run(weights, 1, 1, 1, config, config.paths.init, "lm")[0]
    for number, (ours, expected) in enumerate(zip(rows(tmp_path), plain(config, sft), strict=True)):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=1e-4 if number else 1e-5, abs=1e-5), (number, name)
    assert expected["margin"] > 0.05 and expected["chosen_reward"] != expected["rejected_reward"]


@pytest.fixture(scope="module")
def reference_rows(small_run, tmp_path_factory):
    stage = tmp_path_factory.mktemp("dpo")
    run(dpo.run, 1, 1, 1, small_run.dpo(stage, iterations=3))
    return rows(stage)


@pytest.mark.parametrize(
    ("layout", "values"),
    [((2, 1, 1), {}), ((1, 2, 2), {"micro_batch_size": 1}), ((2, 2, 1), {"sequence_parallel": True})],
)
def test_every_layout_gives_the_same_numbers(small_run, reference_rows, tmp_path, layout, values):
    run(dpo.run, *layout, small_run.dpo(tmp_path, layout=layout[:2], iterations=3, **values))
    for ours, expected in zip(rows(tmp_path), reference_rows, strict=True):
        names = [name for name in expected if name.startswith("heldout")] + [
            "loss",
            "accuracy",
            "margin",
            "chosen_reward",
            "grad_norm",
        ]
        if expected is reference_rows[0]:
            # the policy is the reference: margins are rounding errors, of either sign
            names.remove("accuracy")
        for name in names:
            assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name


def test_it_begins_as_its_own_reference(reference_rows):
    """No reply is preferred yet: loss log 2, rewards 0."""
    first, last = reference_rows[0], reference_rows[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["chosen_reward"] == pytest.approx(0, abs=1e-5)
    assert last["heldout_accuracy_low"] < last["heldout_accuracy"] < last["heldout_accuracy_high"]
    assert last["heldout_kl_from_reference"] != 0 and last["margin"] != 0


def test_the_reference_is_asked_once_and_only_for_what_is_seen(small_run, tmp_path, capfd):
    """Two iterations of 8 queries and the 16 held-out ones; two more ask for 16 more; another SFT
    model asks again."""
    run(dpo.run, 1, 1, 1, small_run.dpo(tmp_path, iterations=2))
    held = torch.load(tmp_path / "reference.pt", weights_only=True)["logprobs"]
    count = len(data(small_run, "reward_heldout"))
    assert (
        f"log-probabilities of {16 + count} queries' replies" in capfd.readouterr().out
        and (~held.isnan().any(1)).sum() == 16 + count
    )
    run(dpo.run, 1, 1, 1, small_run.dpo(tmp_path, iterations=4))
    assert "log-probabilities of 16 queries' replies" in capfd.readouterr().out
    again = torch.load(tmp_path / "reference.pt", weights_only=True)["logprobs"]
    assert torch.equal(again[~held.isnan()], held[~held.isnan()])
    other = small_run.dpo(tmp_path, iterations=5)
    object.__setattr__(other.paths, "init", str(small_run.folder / "convert"))
    run(dpo.run, 1, 1, 1, other)
    assert f"log-probabilities of {40 + count} queries' replies" in capfd.readouterr().out


def test_losses_by_hand():
    assert losses.ipo_loss(torch.tensor([1.0]), 0.5).item() == 1.0  # h = 2, to be 1
    assert losses.logistic_loss(torch.tensor([0.0])).item() == pytest.approx(0.693147)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "hinge"}, "dpo.loss = 'hinge': expected one of sigmoid, ipo"),
        ({"beta": 0.0}, "dpo.beta = 0.0: expected a number above 0"),
        ({"loss": "ipo", "label_smoothing": 0.1}, 'dpo.label_smoothing = 0.1: "ipo" has none'),
        ({"label_smoothing": 0.5}, "dpo.label_smoothing = 0.5: expected at least 0 and below 0.5"),
    ],
)
def test_bad_values_say_what_was_expected(values, message):
    with pytest.raises(ConfigError, match=message):
        build(DPOConfig, {"paths": dict.fromkeys(("output", "model", "init", "train", "heldout"), ""), **values}, "dpo")
