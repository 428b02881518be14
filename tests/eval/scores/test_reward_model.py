"""A reward model as the measure of replies: its scores against a plain computation, win rates by
hand."""

import json
import math
import random
import shutil

import pytest
import torch
from transformers import BloomForSequenceClassification

from eval.answers.heldout import HeldoutPrompt
from eval.errors import DataError
from eval.scores import reward_model
from tests.eval.conftest import tokenizer

PAIRS = [
    ("\n\nHuman: Why?\n\nAssistant:", " Because."),
    ("\n\nHuman: What is it?\n\nAssistant:", " It is blue light."),
    ("A", ""),
]
ASKED = [(HeldoutPrompt(0, prompt, None), reply) for prompt, reply in PAIRS]


def test_scores_are_the_head_s_at_the_end_of_the_reply(judge, monkeypatch):
    """One at a time, without padding, by the body's last hidden state; the prompt loses its head
    beyond the limit."""
    monkeypatch.setattr(reward_model, "TOKENS", 40)  # several batches
    model, words = BloomForSequenceClassification.from_pretrained(judge).eval(), tokenizer()
    for limit in (100, 4):
        found = reward_model.score(judge, ASKED, limit)
        for (prompt, reply), value in zip(PAIRS, found, strict=True):
            ids = [*words(prompt)["input_ids"][-limit:], *words(reply)["input_ids"], words.eos_token_id]
            with torch.no_grad():
                hidden = model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
            assert value == pytest.approx((model.score.weight[0] @ hidden).item(), abs=1e-4)
    assert len(set(found)) == 3


def test_win_rate_by_hand():
    def rows(*scores):
        return [{"index": index, "sample": 0, "score": score} for index, score in enumerate(scores)]

    scored = {"sft": rows(1, 2, 3, 4), "a": rows(2, 2, 2, 5), "b": rows(0, 0, 0, 0)}
    replies = {name: [{"index": at, "sample": 0, "response": "reply"} for at in range(4)] for name in scored}
    made = reward_model.summary(scored, replies, seed=0)
    assert made["score"]["sft"]["mean"] == 2.5 and set(made["win_rate"]) == {"a", "b"}
    assert made["win_rate"]["a"]["mean"] == (1 + 0.5 + 0 + 1) / 4 and made["win_rate"]["a"]["units"] == 4
    assert made["win_rate"]["b"] == {"mean": 0, "low": 0, "high": 0, "units": 4}
    assert (
        made["length_controlled"]["a"]["mean"] == pytest.approx(5 / 8) and made["length_controlled"]["b"]["mean"] == 0
    )
    assert reward_model.summary({}, {}, seed=0) == {"score": {}, "win_rate": {}, "length_controlled": {}}


def test_a_judge_that_likes_only_shortness_prefers_nobody_at_equal_length():
    """It prefers the shorter reply with a probability that rises with the difference, and the
    model's replies are mostly shorter."""
    draw, scored, replies = random.Random(0), {"sft": [], "rlhf": []}, {"sft": [], "rlhf": []}
    for index in range(600):
        longer = draw.randint(-60, 20)
        # the standard deviation of -60 to 20 is 23.4
        won = draw.random() < 1 / (1 + math.exp(1.5 * math.tanh(longer / 23.7)))
        for name, score, length in (("sft", 0.0, 70), ("rlhf", 1.0 if won else -1.0, 70 + longer)):
            scored[name].append({"index": index, "sample": 0, "score": score})
            replies[name].append({"index": index, "sample": 0, "response": "x" * length})
    made = reward_model.summary(scored, replies, seed=0)
    assert made["win_rate"]["rlhf"]["low"] > 0.6 and made["win_rate"]["rlhf"]["units"] == 600
    assert made["length_controlled"]["rlhf"]["low"] < 0.5 < made["length_controlled"]["rlhf"]["high"] < 0.6


def test_kept_replies_are_scored_by_iteration(judge, tmp_path, capsys):
    """The last line of a reply counts; the first model's replies are iteration 0; bad arguments are
    named."""
    rows = [
        {"iteration": at, "index": index, "response": reply}
        for at, index, reply in (
            (4, 0, " torn by a crash"),
            (4, 0, " Because."),
            (4, 1, " It is blue light."),
            (8, 0, " air"),
            (8, 1, " air"),
        )
    ]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, start = tmp_path / "heldout.jsonl", tmp_path / "sft.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt, _ in PAIRS))
    start.write_text(json.dumps({"index": 1, "response": " light"}) + "\n")
    assert reward_model.main([str(tmp_path), f"own={judge}", "--prompts", str(prompts), "--start", str(start)]) == 0
    made = [json.loads(line) for line in (tmp_path / "rescored.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in made] == [0, 4, 8]
    assert made[1]["score_own"] == pytest.approx(sum(reward_model.score(judge, ASKED[:2], 1024)) / 2, abs=1e-6)
    assert reward_model.main([str(tmp_path), f"own={tmp_path}", "--prompts", str(prompts)]) == 65
    assert "can't load it as a reward model" in capsys.readouterr().err


def test_a_model_with_more_labels_is_none(folders, tmp_path):
    BloomForSequenceClassification.from_pretrained(folders["sft"], num_labels=2).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match="2 labels; expected a sequence classifier with one"):
        reward_model.score(tmp_path, ASKED, 10)


@pytest.mark.parametrize("pad", [-1, 320, None])
def test_padding_that_is_no_token_is_named(judge, tmp_path, pad):
    """Llama's first checkpoints said -1; the score is read at the last token that is no padding."""
    shutil.copytree(judge, tmp_path / "judge")
    path = tmp_path / "judge" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": pad}))
    with pytest.raises(DataError, match="pad_token_id|can't load it as a reward model"):
        reward_model.score(tmp_path / "judge", ASKED, 10)
