"""A tokenizer.json as Llama 2's: a normalizer that puts a space before each text, and BOS in the
post-processor."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer

from conversion import classifier
from eval.answers import generation
from training.data.batches import comparison_example, prompt_tokens, sft_example
from training.data.cache import TokenRows, cached
from training.data.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PROMPT = "\n\nHuman: Where does the otter live?\n\nAssistant:"
REPLIES = (" The otter lives in the lake.", " In the lake,\nwhere else?", "The lake.", " 湖")
TEXTS = [PROMPT + reply for reply in REPLIES]


def llama_2(folder: Path, bos: bool = True, **names: str) -> Path:
    """A folder with such a tokenizer of 340 tokens; ``names``: of tokenizer_config.json."""
    table = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    library = Library(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in TEXTS[:3] for word in text.split()] * 9  # no merge across a space
    library.train_from_iterator(words, trainers.BpeTrainer(vocab_size=340, special_tokens=table, show_progress=False))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return llama_2(tmp_path_factory.mktemp("llama") / "model", tokenizer_class="LlamaTokenizer")


@pytest.fixture
def rows(folder, tmp_path) -> TokenRows:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"query": PROMPT, "response": list(REPLIES), "score": [1, 2, 3, 4]}) + "\n")
    return TokenRows(cached(file, "reward", Tokenizer(folder)))


def test_ids_of_prompt_and_reply_are_transformers_ids_of_the_whole_text(folder, rows):
    tokenizer, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos == [1]
    for (example, _), text in zip(comparison_example(rows[0], 512), TEXTS, strict=True):
        assert example.tokens == [*theirs(text)["input_ids"], 2]
        assert example.tokens[: example.response_start] == theirs(PROMPT)["input_ids"]


def test_evaluation_has_the_ids_of_training(folder, rows):
    theirs = AutoTokenizer.from_pretrained(folder)
    assert generation.encode(theirs, PROMPT, 512) == rows[0].prompt
    assert [[*generation.encode_reply(theirs, reply), 2] for reply in REPLIES] == rows[0].replies
    for length in (1, 2, 9, len(rows[0].prompt), 512):
        assert generation.encode(theirs, PROMPT, length) == prompt_tokens(rows[0], length)


def test_bos_stays_where_the_head_is_cut_and_stands_there_once(folder, rows, tmp_path):
    tokenizer, whole = Tokenizer(folder), rows[0].prompt
    assert prompt_tokens(rows[0], 8) == [1, *whole[-7:]] and prompt_tokens(rows[0], len(whole)) == whole
    assert rows.longer_than(len(whole) + max(map(len, rows[0].replies)) - 1) == 1
    example = sft_example(rows[0]._replace(replies=rows[0].replies[:1]), 20)
    assert (
        len(example.tokens) == 20 and example.tokens[0] == 1 and 1 not in example.tokens[1:] and example.tokens[-1] == 2
    )
    written = "<s>" + PROMPT  # as a chat template writes it
    theirs = generation.encode(AutoTokenizer.from_pretrained(folder), written, 512)
    for ids in (*tokenizer.encode_prompts([written]), theirs):
        assert ids[0] == 1 and ids.count(1) == 1


def test_the_cache_of_a_tokenizer_without_bos_is_another_one(folder, rows, tmp_path):
    bare = Tokenizer(llama_2(tmp_path / "bare", bos=False))
    assert bare.bos == [] and cached(tmp_path / "rows.jsonl", "reward", bare).name != rows.folder.name
    assert bare.encode_prompts([PROMPT]) == [rows[0].prompt[1:]]


def test_a_byte_level_tokenizer_without_bos_gives_what_it_gave(demo_run):
    tokenizer, theirs = Tokenizer(demo_run / "model"), AutoTokenizer.from_pretrained(demo_run / "model")
    assert tokenizer.bos == generation.opening(theirs) == []
    assert tokenizer.encode_replies(list(REPLIES)) == tokenizer.encode_all(list(REPLIES))
    assert [generation.encode_reply(theirs, text) for text in REPLIES] == tokenizer.encode_all(list(REPLIES))


@pytest.mark.parametrize(
    ("names", "pad", "filler"), [({"pad_token": "</s>"}, 2, "<s>"), ({"pad_token": None}, 2, "<s>"), ({}, 3, "<pad>")]
)
def test_padding_may_be_eos_and_a_classifier_still_has_one_of_its_own(tmp_path, names, pad, filler):
    tokenizer = Tokenizer(llama_2(tmp_path / "model", **names))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.filler) == (pad, 2, filler)
    (tmp_path / "model" / "config.json").write_text("{}")
    classifier.set_config(tmp_path / "model", SimpleNamespace(family="llama"))
    config, theirs = (
        json.loads((tmp_path / "model/config.json").read_text()),
        AutoTokenizer.from_pretrained(tmp_path / "model"),
    )
    assert theirs.pad_token == filler and config["pad_token_id"] == theirs.pad_token_id != 2
