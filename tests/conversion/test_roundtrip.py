"""Hugging Face -> Megatron -> Hugging Face: every byte of the weights, whatever the shards; and
errors for what is not in the table."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion import tensors, torch_dist
from conversion.weights import entries
from tests.conversion.folders import convert_to, export_from, write_tokenizer
from tests.support.bloom import tiny_bloom
from tests.support.llama import tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from training.config.shape import Shape
from training.models.bloom import table


@pytest.mark.parametrize(
    ("make", "heads", "dtype", "tied"),
    [
        (tiny_bloom, 8, torch.float32, False),
        (tiny_bloom, 6, torch.bfloat16, False),
        (tiny_bloom, 12, torch.float16, True),
        (tiny_llama, 6, torch.bfloat16, False),
        (tiny_llama, 8, torch.float32, True),
        (tiny_mistral, 6, torch.bfloat16, False),
        (tiny_qwen2, 6, torch.bfloat16, False),
        (tiny_qwen2, 8, torch.float32, True),
        (tiny_qwen3, 6, torch.bfloat16, False),
    ],
)
def test_weights_come_back_byte_for_byte(tmp_path, monkeypatch, make, heads, dtype, tied):
    """Odd vocabulary (padded by the trainers), head counts that are no power of two, the published
    files' types, a stored tied head; in blocks that end within groups of what is woven together."""
    monkeypatch.setattr(tensors, "BLOCK", 48 * 5 * dtype.itemsize)
    model = make(tmp_path / "hf", heads=heads, hidden=48, vocab=301)
    model.to(dtype).save_pretrained(tmp_path / "hf")
    original = load_file(tmp_path / "hf" / "model.safetensors")
    if tied:
        head = {"lm_head.weight": model.get_input_embeddings().weight.detach().clone()}
        save_file({**original, **head}, tmp_path / "hf" / "model.safetensors")
    convert_to(tmp_path)
    target = export_from(tmp_path)
    back = load_file(target / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name].view(torch.uint8), original[name].view(torch.uint8)) for name in original)
    if not tied:
        assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()
    reloaded, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (target, tmp_path / "hf"))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, before(tokens).logits)


@pytest.mark.parametrize("make", [tiny_bloom, tiny_llama, tiny_qwen2, tiny_qwen3])
def test_shards_in_and_out(tmp_path, make):
    make(tmp_path / "hf").save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    convert_to(tmp_path)
    target = export_from(tmp_path, max_shard_gb=2e-4)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(file).values()
    )
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "hf", target))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_every_bf16_there_is_keeps_its_bits(tmp_path):
    """All 65536 patterns: NaNs with their payload, -0, numbers below the normal ones. Both into the
    checkpoint and out."""
    model = tiny_bloom(tmp_path / "hf", layers=1, vocab=1024).bfloat16()
    with torch.no_grad():
        model.transformer.word_embeddings.weight.copy_(
            torch.arange(65536).sub(32768).short().view(torch.bfloat16).view(1024, 64)
        )
    model.save_pretrained(tmp_path / "hf")
    convert_to(tmp_path)
    assert (export_from(tmp_path) / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()


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


def test_the_table_names_every_tensor_once():
    listed = list(entries(table.shape(3, 64, 8, 300, 1e-5)))
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


def test_query_key_and_value_stand_by_key_value_head_and_gate_and_up_alternate(tmp_path):
    """What the trainer loads, written out: a wrong order that goes both ways would come back byte
    for byte."""
    state = tiny_llama(tmp_path / "hf", heads=6, groups=2, hidden=48, layers=1).model.layers[0].state_dict()
    convert_to(tmp_path)
    saved = torch_dist.metadata(tmp_path / "convert/checkpoints/iter_0000000/model").state_dict_metadata
    assert tuple(saved["decoder.layers.self_attention.linear_qkv.weight"].size) == (1, 80, 48)
    shape = Shape.read(tmp_path / "hf")
    made = {
        entry.parameter: entry.woven(
            {f"layers.0.{name}": tensors.Stored.of_tensor(value) for name, value in state.items()}
        ).load()
        for entry in entries(shape)
        if entry.layer is not None
    }
    query, key, value = (state[f"self_attn.{name}_proj.weight"] for name in "qkv")
    groups = [query[:24], key[:8], value[:8], query[24:], key[8:], value[8:]]
    assert torch.equal(made["decoder.layers.0.self_attention.linear_qkv.weight"], torch.cat(groups))
    both = made["decoder.layers.0.mlp.linear_gate_up.weight"]
    assert torch.equal(both[0::2], state["mlp.gate_proj.weight"]) and torch.equal(
        both[1::2], state["mlp.up_proj.weight"]
    )
