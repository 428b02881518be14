"""Megatron-LM's classic checkpoints: written at any layout in both families of names, read back to
the same bytes."""

import argparse
import os
import random

import numpy
import pytest
import torch

from conversion import huggingface, megatron_lm
from conversion.config import ConvertConfig, ConvertPaths
from conversion.hf_to_megatron import convert
from conversion.tensors import equal
from tests.support.bloom import tiny_bloom
from training.config.shape import Shape
from training.errors import ConfigError


def source(folder, **values):
    tiny_bloom(folder, layers=2, vocab=301, **values)
    shape = Shape.read(folder)
    return shape, huggingface.read(folder, shape)[1]


@pytest.mark.parametrize(
    ("tensor", "pipeline", "names", "iteration"),
    [(1, 1, "legacy", 0), (2, 2, "legacy", 7), (2, 1, "mcore", 0), (1, 2, "mcore", 3)],
)
def test_there_and_back(tmp_path, tensor, pipeline, names, iteration):
    shape, tensors = source(tmp_path / "hf")
    out = tmp_path / "megatron"
    megatron_lm.write(out, tensors, [], shape, tensor, pipeline, names, iteration)
    assert (out / "latest_checkpointed_iteration.txt").read_text() == str(iteration or "release")
    last = (
        out
        / (f"iter_{iteration:07d}" if iteration else "release")
        / megatron_lm._folder(tensor - 1, pipeline - 1, pipeline)
    )
    assert sorted(path.name for path in last.iterdir()) == ["model_optim_rng.pt"]
    saved = torch.load(last / "model_optim_rng.pt", weights_only=True)
    assert saved["checkpoint_version"] == 3.0 and isinstance(saved["args"], argparse.Namespace)
    embedding = saved["model"]
    if pipeline == 1:
        embedding = (
            embedding["language_model"]["embedding"]["word_embeddings"]["weight"]
            if names == "legacy"
            else embedding["embedding.word_embeddings.weight"]
        )
    else:
        embedding = (
            embedding["word_embeddings_for_head"]["weight"] if names == "legacy" else embedding["output_layer.weight"]
        )
    assert embedding.shape[0] * tensor == shape.padded_vocab(tensor)
    back = megatron_lm.read(out, shape)
    assert back.keys() == tensors.keys()
    assert all(equal(back[name], tensors[name]) for name in tensors)


def test_older_spellings_are_read(tmp_path):
    """Layers under "transformer", attention without "self_": Megatron-LM before 2022. Transformer
    Engine's fused norms in mcore's."""
    shape, tensors = source(tmp_path / "hf")
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    for names, changes in (("legacy", {"self_attention.": "attention."}), ("mcore", fused)):
        out = tmp_path / names
        megatron_lm.write(out, tensors, [], shape, 1, 1, names)
        file = out / "release" / "mp_rank_00" / "model_optim_rng.pt"
        saved = torch.load(file, weights_only=True)
        layers = saved["model"]["language_model"].pop("encoder") if names == "legacy" else saved["model"]
        renamed = {}
        for name, tensor in layers.items():
            for ours, theirs in changes.items():
                name = name.replace(ours, theirs)
            renamed[name] = tensor
        if names == "legacy":
            saved["model"]["language_model"]["transformer"] = renamed
        else:
            saved["model"] = renamed | {"decoder.layers.0.mlp.linear_fc1._extra_state": None}
        torch.save(saved, file)
        back = megatron_lm.read(out, shape)
        assert all(equal(back[name], tensors[name]) for name in tensors)


def test_a_training_checkpoint_goes_by_the_command_line_to_convoy_and_back(tmp_path):
    """With all that Megatron-LM keeps beside the weights (optimizer, random states). Out of a
    Convoy checkpoint, too."""
    shape, tensors = source(tmp_path / "hf")
    hf, out, ours = (str(tmp_path / name) for name in ("hf", "megatron", "ours"))
    given = megatron_lm.arguments().parse_args(
        ["write", out, "--model", hf, "--tensor-parallel", "2", "--iteration", "5"]
    )
    megatron_lm.run(given)
    for file in (tmp_path / "megatron").rglob("*.pt"):
        state = torch.load(file, weights_only=True)
        adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict()
        states = {
            "random_rng_state": random.getstate(),
            "np_rng_state": numpy.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
        }
        state["args"].params_dtype = torch.bfloat16
        torch.save(
            state | {"optimizer": {"optimizer": adam}, "rng_state": [states], "opt_param_scheduler": {"lr": 1e-4}}, file
        )
    megatron_lm.run(megatron_lm.arguments().parse_args(["read", out, ours, "--model", hf]))
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (
        tmp_path / "hf" / "model.safetensors"
    ).read_bytes()
    convert(ConvertConfig(paths=ConvertPaths(str(tmp_path / "convert"), ours)))
    again = ["write", str(tmp_path / "again"), "--model", hf, "--source", str(tmp_path / "convert"), "--names", "mcore"]
    megatron_lm.run(megatron_lm.arguments().parse_args(again))
    back = megatron_lm.read(tmp_path / "again", shape)
    assert back.keys() == tensors.keys() and all(equal(back[name], tensors[name]) for name in tensors)


class Evil:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_missing_old_or_unsafe_is_refused(tmp_path):
    shape, tensors = source(tmp_path / "hf")
    out = tmp_path / "megatron"
    megatron_lm.write(out, tensors, [], shape, 2, 1, "legacy")
    with pytest.raises(ConfigError, match="release is there"):
        megatron_lm.write(out, tensors, [], shape, 2, 1, "legacy")
    file = out / "release" / "mp_rank_00" / "model_optim_rng.pt"
    saved = torch.load(file, weights_only=True)
    torch.save(saved | {"checkpoint_version": 1.0}, file)
    with pytest.raises(
        ConfigError, match="checkpoint_version = 1.0: its query, key and value rows are in an older order"
    ):
        megatron_lm.read(out, shape)
    saved["model"]["language_model"]["encoder"]["layers.0.mlp.extra"] = torch.zeros(2)
    torch.save(saved, file)
    with pytest.raises(ConfigError, match=r"unknown: \['language_model.encoder.layers.0.mlp.extra'\]"):
        megatron_lm.read(out, shape)
    torch.save(saved | {"args": Evil(tmp_path / "ran")}, file)
    with pytest.raises(
        ConfigError, match=r"asks to load more than tensors \(posix.mkdir\).* load it in Megatron-LM's environment"
    ):
        megatron_lm.read(out, shape)
    assert not (tmp_path / "ran").exists()
    file.rename(file.with_suffix(".gone"))
    with pytest.raises(ConfigError, match="mp_rank_00 is missing of TP 2 x PP 1"):
        megatron_lm.read(out, shape)
    (out / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ConfigError, match="iter_0000012: no mp_rank"):
        megatron_lm.read(out, shape)
