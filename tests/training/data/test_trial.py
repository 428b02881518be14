"""plan's trial of a tokenizer: what later stages would do otherwise than training, or fail at, is
known in advance."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors

from training.config.data import ModelConfig
from training.data import demo_model, trial
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError

TEXT = "\n\nHuman: What is 12 plus 345?\n\nAssistant: It's 357, of course. I'll say it's so! 2024-01-02\n"
ROWS = 300


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo_model.write(
        folder,
        [TEXT] * 50,
        ModelConfig(demo_family="llama", demo_vocab=ROWS, demo_layers=1, demo_hidden=8, demo_heads=2),
        0,
    )
    return folder


def changed(folder, original, **changes):
    """A copy of ``original`` after changes: file (without .json) -> values; null leaves a key
    out."""
    shutil.copytree(original, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        merged = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


@pytest.mark.parametrize(
    "changes, note",
    [
        ({}, None),
        (
            {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer"}},
            "AutoTokenizer gives other ids by GPT2Tokenizer for .*; training and",
        ),
        ({"tokenizer_config": {"tokenizer_class": "NoSuchClass"}}, None),
        (
            {"config": {"eos_token_id": 1}},
            r"/config.json: eos_token_id = 1, but the tokenizer ends a text with 2: "
            r".*export's files",
        ),
        ({"generation_config": {"eos_token_id": [1, 0]}}, r"generation_config.json: eos_token_id = \[1, 0\], but"),
        ({"generation_config": {"eos_token_id": [1, 2]}, "config": {"eos_token_id": [2]}}, None),
        (
            {"config": {"auto_map": {"AutoModel": "x.Y"}}},
            r"/config.json: auto_map names code .* not run "
            r"\(trust_remote_code is always off\)",
        ),
        (
            {"tokenizer": {"normalizer": {"type": "Lowercase"}}},
            "a prompt and its reply, tokenised apart as training does, read",
        ),
    ],
)
def test_what_a_person_should_know(tmp_path, original, changes, note):
    notes = trial.check(changed(tmp_path / "m", original, **changes), ROWS, "demo")
    assert bool(notes) == bool(note)
    if note:
        with pytest.raises(ValueError, match=note):
            raise ValueError("\n".join(notes))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"tokenizer": {"pre_tokenizer": {"type": "WordSplitV9"}}},
            "tokenizer.json: pre_tokenizer of type 'WordSplitV9' can't be loaded by tokenizers .*newer version",
        ),
        (
            {"tokenizer": {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}},
            "tokenizer.json: model of type 'BPE' can't be loaded",
        ),
        (
            {"tokenizer": {"added_tokens": None}},
            "can't be loaded by transformers .*KeyError: added_tokens|KeyError: 'added_tokens'",
        ),
        (
            {"tokenizer_config": {"eos_token": "<s>"}},
            "special_tokens_map.json: eos_token = '</s>', tokenizer_config.json says '<s>'",
        ),
        ({"tokenizer_config": {"eos_token": 5}}, "tokenizer_config.json: eos_token = 5: expected a text"),
        (
            {"generation_config": {"max_new_tokens": -5}},
            r"generation_config.json can't be loaded by transformers "
            r"\(ValueError",
        ),
        ({"config": {"id2label": 5}}, "config.json can't be loaded by transformers"),
        ({"config": {"pad_token_id": -1}}, "config.json: pad_token_id = -1: expected a whole number from 0"),
        (
            {"generation_config": {"eos_token_id": []}},
            r"generation_config.json: eos_token_id = \[\]: expected a whole "
            r"number",
        ),
    ],
)
def test_what_would_fail_later_is_refused(tmp_path, original, changes, message):
    with pytest.raises(ConfigError, match=message):
        trial.check(changed(tmp_path / "m", original, **changes), ROWS, "demo")


def test_ids_have_rows_and_the_data_is_compared(tmp_path, original):
    with pytest.raises(ConfigError, match=rf"has id {ROWS - 1}, the embedding has {ROWS - 1} rows"):
        trial.check(original, ROWS - 1, "demo")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Only here: \\u03a9?", "response": "yes"}\nno JSON\n')
    assert any("Only here: \u03a9?" in text for text in trial.texts(str(rows)))
    assert trial.texts(str(tmp_path / "none")) == list(trial.SAMPLES)


def test_a_llama_2_tokenizer_passes_and_prompt_and_reply_join(tmp_path, original):
    """normalizer Prepend and Replace, BOS in the post-processor: each text that is tokenised apart
    would get a space of its own."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "<pad>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "A",
        "s",
        "i",
        "It",
        "\u2581It",
    ]
    words = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            unk_token="<unk>",
            merges=[("\u2581", "It")],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    words.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    words.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    folder = changed(
        tmp_path / "m", original, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    )
    words.save(str(folder / "tokenizer.json"))
    assert not [note for note in trial.check(folder, ROWS, "demo") if "tokenised apart" in note]
    assert Tokenizer(folder).bos == [1]


def test_it_is_a_command_with_one_line_for_bad_data(tmp_path, original):
    os.mkfifo(changed(tmp_path / "m", original) / "merges.txt")
    (tmp_path / "m" / "tokenizer.json").write_text("[" * 10**5)
    command = [sys.executable, "-m", "training.data.trial", str(tmp_path / "m"), "300", "demo"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        asked.returncode == 65
        and asked.stderr.count("\n") == 1
        and "tokenizer.json can't be read as JSON" in asked.stderr
    )
