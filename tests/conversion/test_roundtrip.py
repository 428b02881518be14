"""Hugging Face -> Megatron -> Hugging Face: every byte of the weights, whatever the shards; and errors for what is not in the table."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM

from conversion.weights import entries
from tests.bloom import tiny_bloom
from tests.conversion.folders import convert_to, export_from, write_tokenizer
from training.families import bloom


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
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    theirs, ours = (BloomForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "hf", target))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_every_bf16_there_is_keeps_its_bits(tmp_path):
    """All 65536 patterns: NaNs with their payload, -0, numbers below the normal ones. Both into the checkpoint and out."""
    model = tiny_bloom(tmp_path / "hf", layers=1, vocab=1024).bfloat16()
    with torch.no_grad():
        model.transformer.word_embeddings.weight.copy_(torch.arange(65536).sub(32768).short().view(torch.bfloat16).view(1024, 64))
    model.save_pretrained(tmp_path / "hf")
    convert_to(tmp_path)
    assert (export_from(tmp_path) / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_published_names_without_prefix_and_the_tokenizer_go_through(tmp_path):
    model = tiny_bloom(tmp_path / "hf")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    save_file(stripped, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(tmp_path / "hf")
    convert_to(tmp_path)
    target = export_from(tmp_path, dtype="bf16")
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
        assert (target / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(target / "model.safetensors").values())


def test_the_table_names_every_tensor_once():
    listed = list(entries(bloom.shape(3, 64, 8, 300, 1e-5)))
    assert len({entry.name for entry in listed}) == len(listed) == 5 + 3 * 12
    assert len({(entry.key, entry.layer) for entry in listed}) == len(listed)


def test_converting_again_replaces(tmp_path):
    tiny_bloom(tmp_path / "hf")
    convert_to(tmp_path)
    tiny_bloom(tmp_path / "hf", seed=1)
    convert_to(tmp_path)
    target = export_from(tmp_path)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "convert")
