"""The demo's Hugging Face folder is one that transformers loads, with BLOOM's names, and our
tokenizer gives its ids."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.config.data import ModelConfig
from training.data import demo_model
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError

from .conftest import read

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
TEXTS = [
    "",
    " ",
    "\n\nHuman: Hi.\n\nAssistant:",
    " caf\u00e9 \u4f60\u597d \U0001f600!",
    "a  b\t\tc\r\n(x|y) 3.14, \u0964",
    "</s> <pad>x",
    "\x00\x7f",
]


def test_transformers_loads_every_tensor(demo_run):
    folder = demo_run / "model"
    assert {file.name for file in folder.iterdir()} == FILES
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    config = model.config
    assert type(model).__name__ == "BloomForCausalLM"
    assert (config.hidden_size, config.n_layer, config.n_head, config.vocab_size) == (96, 4, 6, 512)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.transformer.h[0].mlp.dense_h_to_4h.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_names_are_those_of_the_published_checkpoint(demo_run):
    with safe_open(demo_run / "model/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "word_embeddings.weight",
        "word_embeddings_layernorm.bias",
        "h.3.self_attention.query_key_value.weight",
        "ln_f.bias",
    } <= names
    assert len(names) == 5 + 4 * 12 and "lm_head.weight" not in names


def test_ids_are_those_of_transformers(demo_run):
    ours, theirs = Tokenizer(demo_run / "model"), AutoTokenizer.from_pretrained(demo_run / "model")
    assert (
        (ours.eos_id, ours.pad_id, ours.size) == (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (2, 3, 512)
    )
    assert [theirs.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "</s>", "<pad>")] == [0, 1, 2, 3]
    assert theirs.padding_side == "left"
    rows = read(demo_run / "data/sft.jsonl")[:300]
    for text in TEXTS + [row["prompt"] for row in rows] + [row["response"] for row in rows]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_round_trip_is_exact_and_special_tokens_are_left_out(demo_run):
    tokenizer = Tokenizer(demo_run / "model")
    for text in TEXTS[:5] + TEXTS[6:]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([tokenizer.pad_id, *tokenizer.encode(text), tokenizer.eos_id]) == text


def test_vocabulary_that_the_text_cant_fill_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.demo_vocab = 400: the text gives 2\d\d tokens"):
        demo_model.write(tmp_path, ["one two one two"], ModelConfig(demo_vocab=400), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token": None}, "no eos token; name one"),
        ({"pad_token": "<none>"}, "pad_token = '<none>' of the tokenizer's files is not in tokenizer.json"),
    ],
)
def test_special_tokens_that_are_missing_are_refused(demo_run, tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_bytes((demo_run / "model/tokenizer.json").read_bytes())
    tokens = json.loads((demo_run / "model/tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens | change))
    with pytest.raises(ConfigError, match=message):
        Tokenizer(tmp_path)


def test_ids_of_config_json_are_used_where_the_tokenizer_names_none(demo_run, tmp_path):
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((demo_run / "model" / name).read_bytes())
    assert (Tokenizer(tmp_path).eos_id, Tokenizer(tmp_path).pad_id) == (2, 3)


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer.json in it"):
        Tokenizer(tmp_path)
