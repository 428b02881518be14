"""Hugging Face -> Megatron -> Hugging Face: every byte of the weights, whatever the shards; and errors for what is not in the table."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM

from conversion.config import ConvertConfig, ConvertPaths, ExportConfig, ExportPaths
from conversion.hf_to_megatron import convert
from conversion.megatron_to_hf import export
from conversion.weights import HuggingFaceWeights, entries
from tests.bloom import tiny_bloom
from tests.distributed import run
from training.config import ConfigError


def convert_to(folder: Path, **layout) -> None:
    run(convert, 1, 1, 1, ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf")), **layout))


def write_tokenizer(folder: Path) -> None:
    """Five words."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')


def export_from(folder: Path, **values) -> Path:
    paths = ExportPaths(str(folder / "export"), str(folder / "hf"), {"sft": str(folder / "convert")})
    run(export, 1, 1, 1, ExportConfig(paths=paths, **values))
    return folder / "export" / "sft"


@pytest.mark.parametrize(("heads", "dtype", "tied"), [(8, torch.float32, False), (6, torch.bfloat16, False), (12, torch.float16, True)])
def test_weights_come_back_byte_for_byte(tmp_path, heads, dtype, tied):
    """Odd vocabulary (padded by the trainers), head counts that are no power of two, the published files' types, a stored tied head."""
    model = tiny_bloom(tmp_path / "hf", heads=heads, hidden=48, vocab=301)
    model.to(dtype).save_pretrained(tmp_path / "hf")
    original = load_file(tmp_path / "hf" / "model.safetensors")
    if tied:
        head = {"lm_head.weight": original["transformer.word_embeddings.weight"].clone()}
        save_file({**original, **head}, tmp_path / "hf" / "model.safetensors")
    convert_to(tmp_path)
    target = export_from(tmp_path)
    back = load_file(target / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name].view(torch.uint8), original[name].view(torch.uint8)) for name in original)
    if not tied:
        assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    reloaded = BloomForCausalLM.from_pretrained(target)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, model.eval()(tokens).logits)


def test_shards_in_and_out(tmp_path):
    tiny_bloom(tmp_path / "hf").save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    convert_to(tmp_path)
    target = export_from(tmp_path, max_shard_gb=2e-4)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(file.stat().st_size for file in files)
    theirs, ours = (BloomForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "hf", target))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_published_names_without_prefix_and_the_tokenizer_go_through(tmp_path):
    model = tiny_bloom(tmp_path / "hf")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    save_file(stripped, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(tmp_path / "hf")
    convert_to(tmp_path)
    target = export_from(tmp_path, dtype="bf16")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        assert (target / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(target / "model.safetensors").values())


def test_an_unmapped_missing_or_absent_tensor_is_an_error(tmp_path):
    tiny_bloom(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    original = load_file(file)
    save_file({**original, "transformer.h.0.extra": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"unknown: \['h.0.extra'\]"):
        HuggingFaceWeights(tmp_path / "hf", 4)
    save_file({name: tensor for name, tensor in original.items() if "ln_f.bias" not in name}, file)
    with pytest.raises(ConfigError, match=r"missing: \['ln_f.bias'\]"):
        HuggingFaceWeights(tmp_path / "hf", 4)
    file.unlink()
    with pytest.raises(ConfigError, match="safe_serialization=True"):
        HuggingFaceWeights(tmp_path / "hf", 4)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"transformer.ln_f.bias": "gone.safetensors"}}))
    with pytest.raises(ConfigError, match="names files that are not there: gone.safetensors"):
        HuggingFaceWeights(tmp_path / "hf", 4)


def test_the_table_names_every_tensor_once():
    listed = list(entries(3))
    assert len({entry.name for entry in listed}) == len(listed) == 5 + 3 * 12
    assert len({(entry.key, entry.layer) for entry in listed}) == len(listed)


def test_a_layout_that_does_not_divide_is_refused_before_anything_is_written(tmp_path):
    tiny_bloom(tmp_path / "hf", heads=6, hidden=48)
    with pytest.raises(AssertionError, match="tensor_parallel = 4 does not divide the model's 6 attention heads; choose one of 1, 2, 3, 6"):
        convert_to(tmp_path, tensor_parallel=4)
    assert not (tmp_path / "convert").exists()


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tmp_path):
    """Under TP 2 its ids would silently read no row at all."""
    tiny_bloom(tmp_path / "hf", vocab=4)
    write_tokenizer(tmp_path / "hf")
    with pytest.raises(AssertionError, match="the tokenizer has 5 tokens, the embedding only 4 rows"):
        convert_to(tmp_path)


def test_converting_again_replaces(tmp_path):
    tiny_bloom(tmp_path / "hf")
    convert_to(tmp_path)
    tiny_bloom(tmp_path / "hf", seed=1)
    convert_to(tmp_path)
    target = export_from(tmp_path)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "convert")
