"""What an export says beside its weights: as trained, in every file, and nothing of a place outside
the starting model's folder."""

import json
import os
import shutil
import stat

import pytest
from transformers import AutoTokenizer

from eval.answers import generation
from tests.conversion.folders import convert_to, export_from
from training.config.data import ModelConfig
from training.data import demo_model
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError

TEXT = "\n\nHuman: What is 12 plus 345?\n\nAssistant: It's 357, of course. I'll say it's so! 2024-01-02\n"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo_model.write(
        folder,
        [TEXT] * 50,
        ModelConfig(demo_family="llama", demo_vocab=300, demo_layers=2, demo_hidden=48, demo_heads=6),
        0,
    )
    return folder


def exported(tmp_path, original, name="sft", change=None, **changes):
    """The export of ``original`` after changes: file (without .json) -> values."""
    shutil.copytree(original, tmp_path / "hf")
    for file, values in changes.items():
        path = tmp_path / "hf" / f"{file}.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
    if change:
        change(tmp_path / "hf")
    convert_to(tmp_path)
    return export_from(tmp_path, name)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_sound_folder_keeps_its_bytes(tmp_path, original):
    target = exported(tmp_path, original)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        assert (target / name).read_bytes() == (original / name).read_bytes()


@pytest.mark.parametrize(
    "config, generating, ends",
    [(1, 1, 2), ([1, 0], None, 2), (1, [2, 0], [2, 0]), ([2, 1], 2, 2), (None, [1, 2], [1, 2])],
)
def test_every_file_names_the_end_that_was_trained(tmp_path, original, config, generating, ends):
    target = exported(
        tmp_path,
        original,
        config={"eos_token_id": config, "pad_token_id": 0},
        generation_config={"eos_token_id": generating},
    )
    assert Tokenizer(target).eos_id == 2
    assert read(target, "config")["eos_token_id"] == read(target, "generation_config")["eos_token_id"] == ends
    assert read(target, "config")["pad_token_id"] == read(target, "generation_config")["pad_token_id"] == 3
    model, tokenizer = generation.load(target)
    assert set(generation.stops(model, tokenizer)) == set(ends if isinstance(ends, list) else [ends])


def test_a_policy_is_called_a_language_model_and_brings_no_code(tmp_path, original):
    change = {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "x"},
        "label2id": {"x": 0},
        "num_labels": 1,
        "problem_type": "regression",
        "auto_map": {"AutoModel": "evil.Model"},
    }
    target = exported(
        tmp_path, original, config=change, tokenizer_config={"auto_map": {"AutoTokenizer": ["evil.Words", None]}}
    )
    assert read(target, "config") == read(original, "config")
    assert "auto_map" not in read(target, "tokenizer_config")


def test_autotokenizer_of_an_export_gives_the_ids_of_training(tmp_path, original):
    """transformers 5 makes of SmolLM2's folders, whose class is GPT2Tokenizer, one that splits
    otherwise than tokenizer.json."""
    target = exported(tmp_path, original, tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    ours = Tokenizer(tmp_path / "hf")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "hf", target))
    assert before(TEXT)["input_ids"] != ours.encode(TEXT) == after(TEXT)["input_ids"]
    for folder in (tmp_path / "hf", target):
        tokenizer = generation.load_tokenizer(folder)
        assert tokenizer(TEXT)["input_ids"] == ours.encode(TEXT)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (ours.eos_id, ours.pad_id) == (2, 3)


def test_what_links_lead_to_is_not_copied_and_modes_stay_narrow(tmp_path, original):
    key = tmp_path / "id_rsa"
    key.write_text("a key")
    with pytest.raises(ConfigError, match="merges.txt is a link to .*id_rsa, outside the folder"):
        exported(tmp_path, original, change=lambda folder: (folder / "merges.txt").symlink_to(key))
    assert "a key" not in "".join(
        path.read_text("latin-1") for path in (tmp_path / "export").rglob("*") if path.is_file()
    )
    shutil.rmtree(tmp_path / "hf")
    shutil.rmtree(tmp_path / "convert")
    before = os.umask(0o022)
    try:
        target = exported(tmp_path, original, change=lambda folder: (folder / "tokenizer.json").chmod(0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((target / "tokenizer.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((target / "special_tokens_map.json").stat().st_mode) & 0o644 == 0o644


def test_the_cache_of_the_hub_is_an_ordinary_folder(tmp_path, original):
    """snapshots/HASH/NAME is a link to ../../blobs/DIGEST."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "0123abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(original.iterdir())):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "hf").symlink_to(snapshot)
    convert_to(tmp_path)
    target = export_from(tmp_path)
    for path in original.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes() and not (target / path.name).is_symlink()
