"""The demo's data: rerun byte for byte, no held-out prompt in training, and a gold score that
agrees with every preference."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest

from eval.answers.rubric import gold, validate
from training.data import demo
from training.data.tokenizer import Tokenizer

from .conftest import read

pytestmark = pytest.mark.long

SIZES = {
    "sft.jsonl": 6000,
    "sft_heldout.jsonl": 256,
    "reward.jsonl": 4000,
    "reward_heldout.jsonl": 256,
    "rlhf.jsonl": 3000,
    "heldout.jsonl": 256,
}


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for part in ("data", "model")
        for file in sorted((folder / part).rglob("*"))
        if file.is_file()
    }


def test_another_run_gives_the_same_bytes_and_another_seed_does_not(demo_run, tmp_path, prepare):
    first = digests(demo_run)
    caches = [name for name in first if ".jsonl.tokens/" in name]
    # rows, counts.json, model files; nothing half-written is left
    assert len(first) - len(caches) == 6 + 1 + 6
    assert len(caches) == 6 * (6 + 1 + 1)  # of each file: six arrays, about.json, the lock
    assert prepare(tmp_path).returncode == 0
    assert digests(tmp_path) == first
    assert prepare(tmp_path, seed=1).returncode == 0
    second = digests(tmp_path)
    assert all(second[f"data/{name}"] != first[f"data/{name}"] for name in SIZES)
    assert second["model/model.safetensors"] != first["model/model.safetensors"]


def test_sizes(demo_run):
    assert {name: len(read(demo_run / "data" / name)) for name in SIZES} == SIZES


def test_gold_separates_every_pair(demo_run):
    rubrics = {question.prompt: demo.rubric(question) for question in demo.questions()}
    for name in ("reward.jsonl", "reward_heldout.jsonl"):
        for row in read(demo_run / "data" / name):
            scores = dict(
                zip(row["score"], (gold(response, rubrics[row["query"]]) for response in row["response"]), strict=True)
            )
            assert scores[1.0] > scores[0.0] and scores[1.0] >= 0.6, row


def test_every_kind_of_reply_has_the_gold_of_its_faults():
    # rude ones may be over the limit of words too
    expected = {
        "good": {1.0},
        "rude": {0.6, 0.8},
        "rambling": {0.8},
        "offtopic": {0.4},
        "offtopic rambling": {0.2},
        "wrong": {0.2},
        "wrong rude": {0.0, 0.2},
    }
    assert set(expected) == {"good", *demo.BAD} == set(demo.QUALITY)
    rng = random.Random(0)
    for kind, allowed in expected.items():
        found = {gold(demo.reply(question, kind, rng), demo.rubric(question)) for question in demo.questions()}
        assert found == allowed, (kind, found)


def test_held_out_prompts_are_new_but_their_items_are_not(demo_run):
    def prompts(*names):
        return {row.get("prompt", row.get("query")) for name in names for row in read(demo_run / f"data/{name}.jsonl")}

    trained, heldout = prompts("sft", "reward", "rlhf"), prompts("sft_heldout", "reward_heldout", "heldout")
    assert len(heldout) == 256 and not trained & heldout
    item = {question.prompt: (question.task, question.item) for question in demo.questions()}
    assert {item[prompt] for prompt in heldout} <= {item[prompt] for prompt in trained}
    assert len({item[prompt] for prompt in trained}) == 72


def test_quality_is_mixed_and_the_shorter_reply_does_not_always_win(demo_run):
    rubrics = {question.prompt: demo.rubric(question) for question in demo.questions()}
    golds = [gold(row["response"], rubrics[row["prompt"]]) for row in read(demo_run / "data/sft.jsonl")]
    assert 0.38 < Counter(golds)[1.0] / len(golds) < 0.46
    wins = Counter()
    first = 0
    for row in read(demo_run / "data/reward.jsonl"):
        good = row["score"].index(1.0)
        first += good == 0
        difference = len(row["response"][good]) - len(row["response"][1 - good])
        wins["shorter" if difference < 0 else "longer" if difference else "equal"] += 1
    assert 0.35 < wins["shorter"] / 4000 < 0.7 and wins["longer"] / 4000 > 0.25, wins
    assert 0.45 < first / 4000 < 0.55  # the place in the list tells nothing


def test_lengths_in_tokens(demo_run):
    tokenizer = Tokenizer(demo_run / "model")
    for row in read(demo_run / "data/sft.jsonl") + read(demo_run / "data/sft_heldout.jsonl"):
        assert len(tokenizer.encode(row["prompt"])) <= 48
        assert len(tokenizer.encode(row["response"])) < 20  # 20 with the EOS
    for row in read(demo_run / "data/reward.jsonl"):
        assert max(len(tokenizer.encode(response)) for response in row["response"]) < 20


def test_rubrics_are_ones_that_the_evaluation_accepts(demo_run):
    for number, row in enumerate(read(demo_run / "data/heldout.jsonl"), 1):
        validate(row["rubric"], f"heldout.jsonl:{number}")
        assert gold("", row["rubric"]) == 0.0
