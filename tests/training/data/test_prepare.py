"""``python -m training.data.prepare``: a source of comparisons becomes every stage's rows, and
nothing of the rest gets through."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from training.checkpoint import checksums

from .conftest import ROOT, read

pytestmark = pytest.mark.long

HH = ROOT.parent / "shared/data/hh_harmless/harmless-base.test.jsonl.gz"


@pytest.fixture
def own_model(demo_run) -> dict:
    """A checkpoint of the user's own: only its tokenizer is read."""
    return {"checkpoint": str(demo_run / "model")}


def pair(question: str, good: str = "yes", bad: str = "no") -> dict:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"}


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_rows_of_one_prompt_stay_on_one_side(tmp_path, prepare, own_model):
    rows = [pair(f"Is it {number}?", good) for number in range(100) for good in ("yes", "sure")] + [
        pair("is  IT 3?", "yep")
    ]
    done = prepare(tmp_path, own_model, source=write(tmp_path / "hh.jsonl", rows), heldout=0.2, heldout_max=15)
    assert done.returncode == 0, done.stderr
    files = {
        name: read(tmp_path / f"data/{name}.jsonl")
        for name in ("sft", "sft_heldout", "reward", "reward_heldout", "rlhf", "heldout")
    }
    prompts = {
        name: {" ".join(row.get("prompt", row.get("query")).lower().split()) for row in rows}
        for name, rows in files.items()
    }
    assert prompts["sft"] == prompts["reward"] == prompts["rlhf"] and len(prompts["sft"]) == 85
    assert prompts["sft_heldout"] == prompts["reward_heldout"] == prompts["heldout"] and len(prompts["heldout"]) == 15
    assert not prompts["sft"] & prompts["heldout"]
    assert len(files["sft"]) + len(files["sft_heldout"]) == 201 and len(files["rlhf"]) in (85, 86)
    assert not (tmp_path / "model").exists()  # a checkpoint of the user's own: none is made


def test_a_conversation_that_goes_on_from_a_held_out_prompt_is_not_trained_on(tmp_path, prepare, own_model):
    """Its prompt holds a reply to the held-out one."""
    rows = [
        row
        for number in range(60)
        for row in (
            pair(f"Is it {number}?"),
            pair(f"is it  {number}?\n\nAssistant: yes\n\nHuman: Sure?\n\nAssistant: yes\n\nHuman: Really?"),
        )
    ]
    done = prepare(tmp_path, own_model, source=write(tmp_path / "hh.jsonl", rows), heldout=0.2, heldout_max=12)
    assert done.returncode == 0, done.stderr
    heldout, kept = ([row["prompt"] for row in read(tmp_path / f"data/{name}.jsonl")] for name in ("heldout", "rlhf"))
    short = [prompt.removesuffix("\n\nAssistant:").lower().split() for prompt in heldout if "Sure" not in prompt]
    assert short and not any(prompt.lower().split()[: len(one)] == one for prompt in kept for one in short)
    left = json.loads((tmp_path / "data/counts.json").read_text())["read"]["left out: goes on from a held-out prompt"]
    assert 0 < left == 120 - len(heldout) - len(kept)


def test_what_the_rows_and_the_model_are_made_from_is_known_by_its_content(tmp_path, prepare, own_model):
    folder = tmp_path / "model"
    shutil.copytree(own_model["checkpoint"], folder)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    source = write(tmp_path / "hh.jsonl", [pair(f"Is it {number}?") for number in range(9)])
    assert prepare(tmp_path, {"checkpoint": str(folder)}, source=source).returncode == 0
    inputs = json.loads((tmp_path / "data/counts.json").read_text())["inputs"]
    assert {"data.source", "model.checkpoint", "model.safetensors of model.checkpoint"} <= set(inputs)
    for known in inputs.values():
        path = Path(known["path"])
        os.utime(path)
        assert checksums.same(path, known)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        assert not checksums.same(path, known)


def test_row_order_does_not_change_what_is_held_out(tmp_path, prepare, own_model):
    rows = [pair(f"Is it {number}?") for number in range(50)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        folder = tmp_path / name
        folder.mkdir()
        assert prepare(folder, own_model, source=write(folder / "hh.jsonl", order), heldout=0.2).returncode == 0
    a, b = ({row["prompt"] for row in read(tmp_path / name / "data/heldout.jsonl")} for name in "ab")
    assert a == b and len(a) == 10


def test_repetitions_are_written_once_and_counted(tmp_path, prepare, own_model):
    rows = [pair("A?"), pair("A?"), pair("A?", "yes", "never"), pair("B?"), pair("B?"), pair("B?", "yes", "never")]
    done = prepare(tmp_path, own_model, source=write(tmp_path / "hh.jsonl", rows))
    counts = json.loads((tmp_path / "data/counts.json").read_text())
    assert counts["files"] == {
        "sft.jsonl": 1,
        "sft_heldout.jsonl": 1,
        "reward.jsonl": 2,
        "reward_heldout.jsonl": 2,
        "rlhf.jsonl": 1,
        "heldout.jsonl": 1,
    }
    assert counts["read"] == {"rows": 6, "repeated: sft": 4, "repeated: reward": 2, "repeated: rlhf": 4}
    assert "        2  repeated: reward\n" in done.stdout


def test_every_row_goes_to_the_stages_that_it_is_good_for(tmp_path, prepare, own_model):
    """Chat messages and prompts beside comparisons: no row is invented, none is lost."""
    chats = [
        {"messages": [{"role": "user", "content": f"Chat {n}?"}, {"role": "assistant", "content": f"so {n}"}]}
        for n in range(30)
    ]
    rows = (
        [pair(f"Pair {n}?") for n in range(20)]
        + chats
        + [{"prompt": f"\n\nHuman: Only {n}?\n\nAssistant:"} for n in range(10)]
    )
    done = prepare(tmp_path, own_model, source=write(tmp_path / "rows.jsonl", rows), heldout=0.1)
    assert done.returncode == 0, done.stderr
    files = json.loads((tmp_path / "data/counts.json").read_text())["files"]
    assert [
        files[f"{stage}.jsonl"] + files[f"{heldout}.jsonl"]
        for stage, heldout in (("sft", "sft_heldout"), ("reward", "reward_heldout"), ("rlhf", "heldout"))
    ] == [50, 20, 60]
    assert 6 <= files["heldout.jsonl"] <= 6 + 5 + 2
    assert {
        row["response"] for row in read(tmp_path / "data/sft.jsonl") + read(tmp_path / "data/sft_heldout.jsonl")
    } == {" yes", *(f" so {n}" for n in range(30))}


def test_a_few_comparisons_among_many_prompts_are_held_out_by_their_own_number(tmp_path, prepare, own_model):
    """A tenth of 20 pairs beside a tenth, at most 5, of 2,000 prompts: one order of all would hold
    out none of the pairs."""
    rows = [{"prompt": f"\n\nHuman: Only {n}?\n\nAssistant:"} for n in range(2000)] + [
        pair(f"Pair {n}?") for n in range(20)
    ]
    done = prepare(tmp_path, own_model, source=write(tmp_path / "rows.jsonl", rows), heldout=0.1, heldout_max=5)
    assert done.returncode == 0, done.stderr
    files = json.loads((tmp_path / "data/counts.json").read_text())["files"]
    assert files == {
        "sft.jsonl": 18,
        "sft_heldout.jsonl": 2,
        "reward.jsonl": 18,
        "reward_heldout.jsonl": 2,
        "rlhf.jsonl": 2013,
        "heldout.jsonl": 7,
    }
    seen, unseen = ({row["prompt"] for row in read(tmp_path / f"data/{name}.jsonl")} for name in ("rlhf", "heldout"))
    pairs = {row["query"] for row in read(tmp_path / "data/reward_heldout.jsonl")}
    assert pairs <= unseen and not pairs & seen


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair("A?"), {"chosen": 5, "rejected": "x"}], "rows.jsonl:2: chosen: 5: expected a string"),
        ([pair("A?", "")], "no usable row: 1 rows read; dropped: 1 empty reply"),
        ([pair("A?"), pair("A?", "sure")], "1 distinct prompt; expected at least 2"),
    ],
)
def test_data_that_cant_be_used_is_65_in_one_line(tmp_path, prepare, own_model, rows, message):
    done = prepare(tmp_path, own_model, source=write(tmp_path / "rows.jsonl", rows))
    assert done.returncode == 65 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"sede": 1}, "did you mean"),
        ({"demo_vocab": 100_000}, {}, "model.demo_vocab = 100000: the text gives"),
    ],
)
def test_a_bad_configuration_is_64_in_one_line(tmp_path, prepare, model, data, message):
    done = prepare(tmp_path, model, **data)
    assert done.returncode == 64 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "model").exists() and not (tmp_path / "data").exists()


@pytest.mark.skipif(not HH.exists(), reason="the real HH file is not here: ../shared/data/hh_harmless")
def test_real_hh(tmp_path, prepare):
    done = prepare(tmp_path, source=str(HH))
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "data/counts.json").read_text())
    read_counts, files = counts["read"], counts["files"]
    assert read_counts["rows"] == 2312
    assert (
        read_counts["dropped: prompts of chosen and rejected differ"] == 5 and read_counts["dropped: empty reply"] == 4
    )
    dropped = sum(number for reason, number in read_counts.items() if reason.startswith(("dropped", "left out")))
    assert files["reward.jsonl"] + files["reward_heldout.jsonl"] == 2312 - dropped
    for row in read(tmp_path / "data/reward.jsonl"):
        assert row["query"].endswith("\n\nAssistant:") and all(
            response[0] == " " != response[1] for response in row["response"]
        )
    # the demo's model, with a tokenizer trained on HH
    assert (tmp_path / "model/model.safetensors").exists()
