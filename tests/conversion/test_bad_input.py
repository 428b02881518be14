"""Bad input: each a clear error, before anything is written; no pickle from outside runs code."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import huggingface, torch_dist, work
from tests.conversion.folders import convert_to, export_from, sparse_bloom, write_tokenizer
from tests.support.bloom import tiny_bloom
from tests.support.llama import tiny_llama
from training.config.shape import Shape
from training.errors import ConfigError, Damaged
from training.models.bloom import table as bloom


class Evil:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def refused(folder, match):
    with pytest.raises(ConfigError, match=match):
        convert_to(folder)
    assert not (folder / "convert" / "checkpoints" / "iter_0000000").exists()


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_not_a_bloom_missing_shard_truncated_wrong_type_wrong_shape(tmp_path):
    hf, whole = tmp_path / "hf", tmp_path / "whole"
    tiny_bloom(whole, layers=2)
    original = load_file(whole / "model.safetensors")

    def fresh():
        shutil.rmtree(hf, ignore_errors=True)
        shutil.copytree(whole, hf)
        return hf / "model.safetensors"

    fresh()
    change(hf, model_type="gpt2")
    refused(tmp_path, "model_type = 'gpt2'; expected one of bloom, llama")
    fresh().unlink()
    refused(tmp_path, "safe_serialization=True")
    (hf / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"transformer.ln_f.bias": "gone.safetensors"}})
    )
    refused(tmp_path, "gone.safetensors is missing, model.safetensors.index.json names it")
    (hf / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path, "is no index of shards")
    file = fresh()
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(
        tmp_path,
        f"truncated or damaged: {len(content) - 1:,} bytes, its header says {len(content):,}; download it again",
    )
    file.write_bytes(content[:100])
    refused(tmp_path, "truncated or no safetensors file: 100 bytes")
    file.write_bytes(b"")
    refused(tmp_path, "truncated or no safetensors file: 0 bytes")
    save_file({**original, "transformer.h.0.extra": torch.zeros(1)}, file)
    refused(tmp_path, r"unknown: \['h.0.extra'\]")
    save_file({name: tensor for name, tensor in original.items() if "ln_f.bias" not in name}, file)
    refused(tmp_path, r"missing: \['ln_f.bias'\]")
    save_file({name: tensor.to(torch.int8) for name, tensor in original.items()}, file)
    refused(tmp_path, "has type I8; weights are BF16, F16 or F32")
    save_file({name: tensor.half() if ".h.1." in name else tensor for name, tensor in original.items()}, file)
    refused(tmp_path, "h.1.input_layernorm.weight is torch.float16, in layer 0 it is torch.float32")
    save_file(
        {
            name: tensor[:1] if name.endswith("h.1.mlp.dense_h_to_4h.bias") else tensor
            for name, tensor in original.items()
        },
        file,
    )
    refused(tmp_path, r"h.1.mlp.dense_h_to_4h.bias has shape \[1\], config.json says \[256\]")
    fresh()
    change(hf, vocab_size=299)
    refused(tmp_path, "word_embeddings.weight has 300 rows, config.json says vocab_size = 299")


def test_layouts_that_do_not_fit_and_a_wrong_tokenizer(tmp_path):
    tiny_bloom(tmp_path / "hf", heads=6, hidden=48, layers=2, vocab=4)
    with pytest.raises(
        ConfigError, match="tensor_parallel = 4 does not divide the model's 6 attention heads; choose one of 1, 2, 3, 6"
    ):
        convert_to(tmp_path, tensor_parallel=4)
    with pytest.raises(ConfigError, match="pipeline_parallel = 3 is more than the model's 2 layers"):
        convert_to(tmp_path, pipeline_parallel=3)
    write_tokenizer(tmp_path / "hf")
    refused(tmp_path, "token 'b' of the tokenizer has id 4, the embedding only 4 rows")
    assert not (tmp_path / "convert").exists()


def test_no_space_is_known_before_anything_is_written(tmp_path):
    """The model is a file with holes, twice as large as the room on the disk."""
    rows = 2 * shutil.disk_usage(tmp_path).free // 128
    sparse_bloom(tmp_path / "hf", rows)
    with pytest.raises(
        OSError, match=f"{rows * 128 * work.EXTRA / 1e9:,.2f} GB are needed, .* are free; make room or write to"
    ):
        convert_to(tmp_path)
    assert not list((tmp_path / "convert").rglob("*.distcp*"))


def test_buffers_that_transformers_once_saved_are_left_out(tmp_path):
    tiny_llama(tmp_path / "hf", layers=1)
    file = tmp_path / "hf" / "model.safetensors"
    original, expected = load_file(file), file.read_bytes()
    save_file({**original, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file)
    convert_to(tmp_path)
    assert (export_from(tmp_path) / "model.safetensors").read_bytes() == expected


def test_legacy_bin_files_are_read_weights_only(tmp_path):
    model = tiny_bloom(tmp_path / "hf", layers=2)
    safe = tmp_path / "hf" / "model.safetensors"
    expected = safe.read_bytes()
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.transformer.state_dict().items()}
    names = sorted(state)
    safe.unlink()
    for number, part in enumerate((names[:9], names[9:]), 1):
        torch.save({name: state[name] for name in part}, tmp_path / "hf" / f"pytorch_model-{number:05d}-of-00002.bin")
    places = {name: f"pytorch_model-{1 if name in names[:9] else 2:05d}-of-00002.bin" for name in names}
    (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    convert_to(tmp_path)
    assert (export_from(tmp_path) / "model.safetensors").read_bytes() == expected
    hostile = {**state, "x": Evil(tmp_path / "ran")}
    for content, match in (
        (hostile, r"asks to load more than tensors \(posix.mkdir\).* is not loaded"),
        ([1, 2], "holds list"),
    ):
        shutil.rmtree(tmp_path / "convert", ignore_errors=True)
        torch.save(content, tmp_path / "hf" / "pytorch_model-00001-of-00002.bin")
        refused(tmp_path, match)
    whole = (tmp_path / "hf" / "pytorch_model-00002-of-00002.bin").read_bytes()
    (tmp_path / "hf" / "pytorch_model-00001-of-00002.bin").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "can't be read .*truncated")
    assert not (tmp_path / "ran").exists()


def test_a_megatron_checkpoint_that_is_cut_or_hostile_is_refused(tmp_path):
    tiny_bloom(tmp_path / "hf", layers=2)
    convert_to(tmp_path)
    shape, model = Shape.read(tmp_path / "hf"), tmp_path / "convert" / "checkpoints" / "iter_0000000" / "model"
    data = model / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    with pytest.raises(Damaged, match="__0_0.distcp.* does not have the sha256"):
        export_from(tmp_path)
    with pytest.raises(ConfigError, match="is truncated"):
        torch_dist.read(model, shape, "tied")
    data.write_bytes(b"")
    with pytest.raises(Damaged, match="__0_0.distcp.* does not have the sha256"):
        export_from(tmp_path)
    # zip headers, values, the directory at the end
    for at in (
        0,
        60,
        len(whole) // 2,
        len(whole) - 30,
        len(whole) - 300,
    ):
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(Damaged, match="__0_0.distcp.* does not have the sha256"):
            export_from(tmp_path)
    assert not (tmp_path / "export" / "sft").exists()
    data.unlink()
    with pytest.raises(ConfigError, match="__0_0.distcp is missing"):
        torch_dist.read(model, shape, "tied")
    with pytest.raises(ConfigError, match="has 2 layers, the model's config.json says 3"):
        data.write_bytes(whole)
        torch_dist.read(model, bloom.shape(3, shape.hidden, shape.heads, shape.vocab, shape.norm_eps), "tied")
    described = torch_dist.metadata(model)
    described.state_dict_metadata["decoder.layers.extra"] = described.state_dict_metadata[
        "decoder.final_layernorm.bias"
    ]
    (model / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(
        ConfigError, match="decoder.layers.extra is no tensor of a bloom with this head and would be lost"
    ):
        torch_dist.read(model, shape, "tied")
    del (
        described.state_dict_metadata["decoder.final_layernorm.bias"],
        described.state_dict_metadata["decoder.layers.extra"],
    )
    (model / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(ConfigError, match="decoder.final_layernorm.bias is missing; is it a checkpoint of this model"):
        torch_dist.read(model, shape, "tied")
    with open(model / ".metadata", "wb") as file:
        pickle.dump(Evil(tmp_path / "ran"), file)
    with pytest.raises(Damaged, match="mkdir"):
        torch_dist.read(model, shape, "tied")
    assert not (tmp_path / "ran").exists()


def test_the_header_is_checked_against_the_file(tmp_path):
    """Offsets that point outside, or do not fit the shape, must not be read."""
    path = tmp_path / "model.safetensors"
    table = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(ConfigError, match=r"a is F32 \[4\] but has 12 bytes"):
        huggingface.read_safetensors(path)
