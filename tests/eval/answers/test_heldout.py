import json
import random

import pytest
import torch

from eval.answers import generation, heldout
from eval.config import MTBenchConfig, MTBenchPaths
from eval.errors import DataError
from eval.files.jsonl import recover
from eval.scores import bootstrap, gold_score


def settings(**values) -> MTBenchConfig:
    paths = MTBenchPaths(output="", models={}, heldout="", stages={}, report="")
    return MTBenchConfig(paths=paths, max_new_tokens=8, heldout_max_new_tokens=8, **values)


def rows() -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "index": i,
            "sample": 0,
            "key": str(i),
            "prompt": f"\n\nHuman: {'why ' * i}?\n\nAssistant:",
            "tokens": [draw.randrange(4, 260) for _ in range(1 + i)] + [2],
        }
        for i in range(5)
    ]


def test_kl_of_a_model_with_itself_is_exactly_zero(folders):
    found = heldout.kl_rows(folders["sft"], folders["sft"], rows(), "base", settings())
    assert [row["kl"] for row in found] == [0.0] * 5
    assert [row["tokens"] for row in found] == [2, 3, 4, 5, 6]


def test_kl_equals_a_token_by_token_computation(folders):
    """Each token alone: a forward pass without padding on everything before it, and the log of a
    softmax in float64."""
    found = heldout.kl_rows(folders["rlhf"], folders["sft"], rows(), "base", settings())
    models = [generation.load(folders[name]) for name in ("rlhf", "sft")]
    for row, kl in zip(rows(), found, strict=True):
        expected = 0.0
        for sign, (model, tokenizer) in zip((1, -1), models, strict=True):
            ids = tokenizer(row["prompt"])["input_ids"]
            for token in row["tokens"]:
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, -1].double()
                expected += sign * torch.log(logits.softmax(-1)[token]).item()
                ids.append(token)
        assert kl["kl"] == pytest.approx(expected, abs=2e-5) and kl["kl"] != 0


def test_logprobs_do_not_depend_on_the_batch(folders, monkeypatch):
    model, tokenizer = generation.load(folders["sft"])
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows()]
    responses = [row["tokens"] for row in rows()]
    together = heldout.response_logprobs(model, prompts, responses)
    monkeypatch.setattr(heldout, "_LOGITS", 1)  # one row at a time
    assert heldout.response_logprobs(model, prompts, responses) == pytest.approx(together, abs=1e-5)


def test_summary_is_by_prompt_and_paired():
    """Two samples a prompt: sft .2/.4 and .6, rlhf 1 and .8; means .45 and .9, difference .45, by
    hand."""

    def reply(index, sample, gold):
        return {"index": index, "sample": sample, "gold": gold}

    replies = {
        "sft": [reply(0, 0, 0.2), reply(0, 1, 0.4), reply(1, 0, 0.6), reply(1, 1, 0.6), reply(2, 0, None)],
        "rlhf": [reply(0, 0, 1.0), reply(0, 1, 1.0), reply(1, 0, 0.8), reply(1, 1, 0.8), reply(2, 0, None)],
    }
    kls = {
        "rlhf": [
            {"index": 0, "sample": 0, "kl": 1.0},
            {"index": 0, "sample": 1, "kl": 3.0},
            {"index": 1, "sample": 0, "kl": 4.0},
        ]
    }
    found = gold_score.summary(replies, kls, seed=0)
    assert found["gold"]["sft"]["mean"] == pytest.approx(0.45) and found["gold"]["rlhf"]["mean"] == pytest.approx(0.9)
    difference = found["gold_difference"]["rlhf"]
    assert difference["mean"] == pytest.approx(0.45)
    # the two prompts' own differences
    assert (difference["low"], difference["high"]) == (
        pytest.approx(0.2),
        pytest.approx(0.7),
    )
    assert found["kl"]["rlhf"]["mean"] == pytest.approx(3.0) and found["kl"]["rlhf"]["units"] == 2
    assert found["prompts"] == 3 and found["baseline"] == "sft" and "sft" not in found["kl"]


def test_without_rubrics_there_is_no_gold():
    replies = {name: [{"index": 0, "sample": 0, "gold": None}] for name in ("sft", "rlhf")}
    found = gold_score.summary(replies, {"rlhf": [{"index": 0, "sample": 0, "kl": 1.0}]}, seed=0)
    assert found["gold"] == {} and found["gold_difference"] == {}


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": 3}', "row 1: prompt = 3: expected a non-empty string"),
        ('{"prompt": "a", "rubric": {"must": []}}', "rubric ="),
        (
            '{"prompt": "a", "rubric": {"must": [], "must_not": [], "max_words": "3"}}',
            "rubric.max_words = '3': expected int",
        ),
        ('{"prompt": "a"', "line 1: not JSON"),
        ("", "no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "heldout.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match="heldout.jsonl") as error:
        heldout.load(str(path))
    assert message in str(error.value)


def test_bootstrap_is_seeded_and_right_in_size():
    """Against the normal interval of a mean: for 400 values both must agree to a tenth of its
    width."""
    draw = random.Random(1)
    values = [draw.gauss(2.0, 3.0) for _ in range(400)]
    found = bootstrap.mean(values, seed=3)
    assert found == bootstrap.mean(values, seed=3) and found != bootstrap.mean(values, seed=4)
    spread = torch.tensor(values, dtype=torch.float64).std().item() / 20 * 1.96
    assert found.mean == pytest.approx(sum(values) / 400)
    assert found.high - found.mean == pytest.approx(spread, rel=0.1) and found.mean - found.low == pytest.approx(
        spread, rel=0.1
    )


def test_a_paired_difference_of_a_shift_has_no_width():
    values = [1.0, 5.0, 2.0]
    found = bootstrap.paired_difference([v + 0.5 for v in values], [1] * 3, values, [1] * 3, seed=0)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_rows_are_found_by_key(tmp_path):
    path = tmp_path / "replies.jsonl"
    lines = [
        {"index": 0, "sample": 0, "key": "old"},
        {"index": 0, "sample": 0, "key": "new"},
        {"index": 1, "sample": 0, "key": "old"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"index": 2, "sam')
    assert heldout.stored(recover(path), {(0, 0): "new", (1, 0): "new", (2, 0): "new"}) == {(0, 0): lines[1]}
    # the torn line is gone, the next append starts on a line of its own
    assert path.read_text().endswith('"old"}\n')
