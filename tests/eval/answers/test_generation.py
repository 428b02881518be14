import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.answers import generation
from eval.answers.dialogue import dialogue
from eval.answers.generation import Prompt, RowSampler
from eval.errors import DataError
from eval.files import fingerprint
from eval.scores import reward_model

HH = "\n\nHuman: {question}\n\nAssistant:"
QUESTIONS = [
    "What is the colour of the sky?",
    "Why?",
    "Is the air blue, or is the light of the sky blue because of the air?",
]


def prompts(temperature: float) -> list[Prompt]:
    return [Prompt(dialogue([question], [], HH), temperature, f"q/{i}") for i, question in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def loaded(folders):
    return generation.load(folders["sft"])


def replies(loaded, given, new=24, context=256, **settings):
    return generation.generate(
        *loaded, given, max_new_tokens=new, context_length=context, seed=0, **{"stop": ("\n\nHuman:",), **settings}
    )


def test_greedy_batch_equals_hugging_face_one_by_one(folders, loaded):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folders["sft"]),
        AutoTokenizer.from_pretrained(folders["sft"]),
    )
    for prompt, reply in zip(prompts(0), replies(loaded, prompts(0)), strict=True):
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=3
        )
        expected = alone[0, ids.shape[1] :].tolist()
        assert reply.tokens == expected
        assert reply.finish == ("eos" if 2 in expected else "length")


def test_a_sampled_reply_does_not_depend_on_its_neighbours(loaded):
    together = replies(loaded, prompts(1))
    assert [replies(loaded, [prompt])[0] for prompt in prompts(1)] == together
    assert replies(loaded, prompts(1)[::-1])[::-1] == together
    assert len({tuple(reply.tokens) for reply in together}) == 3


def test_greedy_and_sampled_rows_share_a_batch(loaded):
    greedy, sampled = replies(loaded, prompts(0)), replies(loaded, prompts(1))
    mixed = [prompts(0)[0], prompts(1)[1], prompts(0)[2]]
    assert replies(loaded, mixed) == [greedy[0], sampled[1], greedy[2]]


def test_the_key_names_the_random_numbers():
    assert np.array_equal(generation.uniforms("a", 0, 5), generation.uniforms("a", 0, 9)[:5])
    assert not np.array_equal(generation.uniforms("a", 0, 5), generation.uniforms("b", 0, 5))
    assert not np.array_equal(generation.uniforms("a", 0, 5), generation.uniforms("a", 1, 5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_sampler_draws_from_the_tempered_softmax(temperature):
    """Evenly spaced numbers must land on each token as often as its probability says, to one part
    in their count."""
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, float("-inf")])
    count = 10_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sampler = RowSampler(torch.full((count,), temperature, dtype=torch.float64), grid[:, None])
    drawn = sampler(None, logits.repeat(count, 1)).argmax(-1).bincount(minlength=5) / count
    assert torch.allclose(drawn.double(), (logits.double() / temperature).softmax(-1), atol=1.1 / count)


def test_eos_ends_a_row_and_is_not_in_its_text(loaded):
    """The most likely first token is made the end-of-sequence token: greedy replies are then that
    token alone."""
    first = replies(loaded, prompts(0)[:1])[0].tokens[0]
    model, tokenizer = loaded
    eos = tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    try:
        reply = replies((model, tokenizer), prompts(0)[:1])[0]
    finally:
        tokenizer.eos_token = eos
    assert (reply.tokens, reply.text, reply.finish) == ([first], "", "eos")


def test_a_stop_string_ends_the_row_and_is_cut_off(loaded):
    """Any text the model makes can be the stop string; the row that makes it ends there and the
    others go on."""
    whole = replies(loaded, prompts(1))
    stop = re.search("[a-z]{4}", whole[0].text)[0]
    cut = replies(loaded, prompts(1), stop=(stop,))
    assert stop in whole[0].text and cut[0].finish == "stop"
    for before, after in zip(whole, cut, strict=True):
        assert after.text == before.text.split(stop)[0]
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert (after.finish == "stop") == (stop in before.text)


def test_a_long_prompt_loses_its_head_and_keeps_the_cue(loaded):
    model, tokenizer = loaded
    long = dialogue(["blue " * 200 + "end?"], [], HH)
    ids = generation.encode(tokenizer, long, 20)
    assert len(ids) == 20 and tokenizer.decode(ids).endswith("end?\n\nAssistant:")
    short = tokenizer.decode(ids)
    assert replies(loaded, [Prompt(long, 0, "a")], new=8, context=28) == replies(
        loaded, [Prompt(short, 0, "a")], new=8, context=28
    )


def test_dialogue_of_two_turns():
    assert dialogue(["one {x}?"], [], HH) == "\n\nHuman: one {x}?\n\nAssistant:"
    assert dialogue(["a", "b"], ["first"], HH) == "\n\nHuman: a\n\nAssistant: first\n\nHuman: b\n\nAssistant:"
    assert dialogue(["a", "b"], [""], HH) == "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant:"


def test_the_fingerprint_follows_all_that_is_read_and_nothing_else(folders, tmp_path):
    assert fingerprint.of_model(folders["sft"]) != fingerprint.of_model(folders["rlhf"])
    for file in folders["sft"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    mark = fingerprint.of_model(folders["sft"])
    for name in ("conversion.json", "DONE.json", "training_args.bin", "README.md", ".cache.json.lock"):
        (tmp_path / name).write_text("made at another time")
    assert fingerprint.of_model(tmp_path) == mark
    seen = {mark}
    (tmp_path / "additional_chat_templates").mkdir()
    for name in (
        "chat_template.jinja",
        "merges.txt",
        "vocab.json",
        "tokenizer.model",
        "x.tiktoken",
        "additional_chat_templates/b.jinja",
    ):
        (tmp_path / name).write_text("changed")
        seen.add(fingerprint.of_model(tmp_path))
    assert len(seen) == 7
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "merges.txt").symlink_to("nowhere")
    assert fingerprint.of_model(tmp_path) not in seen


def test_a_folder_of_tasks_is_known_by_its_files(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/task.yaml").write_text("x")
    mark = fingerprint.of_folder(tmp_path)
    (tmp_path / "a/__pycache__").mkdir()
    (tmp_path / "a/__pycache__/x.pyc").write_text("y")
    assert fingerprint.of_folder(tmp_path) == mark
    (tmp_path / "a/b/rows.jsonl").write_text("{}")
    assert fingerprint.of_folder(tmp_path) != mark


def test_code_in_a_models_folder_is_never_run(folders, tmp_path, capsys):
    """An architecture of the folder's own is refused without a question; beside one that
    transformers has, it is left alone."""
    for file in folders["sft"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n")
    config = json.loads((tmp_path / "config.json").read_text())
    own = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.Own",
        "AutoModelForSequenceClassification": "own.Own",
    }
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    generation.load(tmp_path)
    assert (
        "brings code of its own, which is never run: transformers' BloomForCausalLM is used" in capsys.readouterr().out
    )
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    for load in (generation.load, lambda folder: reward_model.score(folder, [], 9)):
        with pytest.raises(DataError, match="code in a model's folder is never run"):
            load(tmp_path)
    assert not (tmp_path / "ran").exists()
