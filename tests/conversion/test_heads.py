"""Tied and untied output matrices, and scalar heads as Hugging Face's sequence classifiers that
score equally."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BloomConfig, BloomForCausalLM

from conversion import verify
from conversion.classifier import folded
from tests.conversion.folders import (
    REWARD_BIAS,
    VALUE_BIAS,
    convert_to,
    export_from,
    save_model,
    trainer,
    write_tokenizer,
)
from tests.support.bloom import tiny_bloom
from tests.support.distributed import run
from tests.support.llama import tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.errors import ConfigError
from training.models.heads import read_last
from training.trainer.step import build_model, evaluate

VOCAB = 301


def untied_bloom(folder):
    torch.manual_seed(3)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=6, initializer_range=0.15, tie_word_embeddings=False
    )
    model = BloomForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def logits(folder, tokens, tensor, pipeline):
    model = build_model(Shape.read(folder / "hf"), trainer(tensor, pipeline), "lm")
    format.load_weights(StageFolder(folder / "convert").resolve() / "model", model)
    kept = []

    def read(output, micro):
        kept.append(output.logits())
        return torch.zeros(micro["tokens"].shape)

    evaluate(model, {"tokens": tokens}, 2, read)
    return kept[0] if kept else None


def test_an_untied_head_goes_both_ways_and_gives_hugging_faces_logits(tmp_path):
    """Also at TP 2 x PP 2: the head is padded like the embedding, and it is not the embedding that
    multiplies."""
    model = untied_bloom(tmp_path / "hf")
    assert Shape.read(tmp_path / "hf").parameters() == sum(parameter.numel() for parameter in model.parameters())
    convert_to(tmp_path)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(tokens).logits
    whole = run(logits, 1, 1, 1, tmp_path, tokens, 1, 1)[0]
    assert (whole[..., :VOCAB] - expected).abs().max() <= 1e-5 * expected.abs().max()
    shards = [shard for shard in run(logits, 2, 2, 1, tmp_path, tokens, 2, 2) if shard is not None]
    assert (torch.cat(shards, -1)[..., :VOCAB] - expected).abs().max() <= 1e-5 * expected.abs().max()
    target = export_from(tmp_path)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_a_head_of_its_own_in_a_model_called_tied_is_refused(tmp_path):
    untied_bloom(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="lm_head.weight differs from the embedding, but config.json ties them"):
        convert_to(tmp_path)


def scores(folder, batch, source):
    model = build_model(Shape.read(folder / "hf"), trainer(), "scalar")
    format.load_weights(source, model)
    return read_last(evaluate(model, batch, 2, lambda values, micro: values), batch)


@pytest.mark.parametrize(
    ("make", "dtype", "name", "stage", "inner"),
    [
        (tiny_bloom, "fp32", "value", "rlhf", "value"),
        (tiny_bloom, "bf16", "reward", "reward", "model"),
        (tiny_llama, "fp32", "value", "rlhf", "value"),
        (tiny_mistral, "bf16", "reward", "reward", "model"),
        (tiny_qwen2, "fp32", "reward", "reward", "model"),
        (tiny_qwen3, "fp32", "value", "rlhf", "value"),
    ],
)
def test_a_scalar_head_scores_equally_as_a_sequence_classifier(tmp_path, make, dtype, name, stage, inner):
    """Saved at TP 2 x PP 2, with a bias (BLOOM), rows padded on the right; AutoModel finds the
    class and the last real token."""
    model = make(tmp_path / "hf", layers=2, vocab=VOCAB)
    if dtype == "bf16":
        model.bfloat16().save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    convert_to(tmp_path)
    run(save_model, 2, 2, 1, tmp_path, stage, "scalar", -1.7, 2, 2, inner)
    target = export_from(tmp_path, name, stage, dtype=dtype)
    lengths = torch.tensor([3, 11, 7, 12])
    tokens = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(2))
    tokens = tokens.masked_fill(torch.arange(12) >= lengths[:, None], 2)
    theirs, loading = AutoModelForSequenceClassification.from_pretrained(
        target, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == type(model).__name__.replace("CausalLM", "SequenceClassification")
    assert theirs.config.pad_token_id == 2
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    with torch.no_grad():
        found = theirs(tokens).logits.squeeze(-1)
    ours = run(
        scores,
        1,
        1,
        1,
        tmp_path,
        {"tokens": tokens, "lengths": lengths},
        StageFolder(tmp_path / stage).resolve() / inner,
    )[0]
    # Llama's classifier can't hold what is to be added: the SFT policy's responses score 0 with it
    if make is tiny_bloom:
        ours = ours + {"reward": REWARD_BIAS, "rlhf": VALUE_BIAS}[stage]
    # In bf16 the head's weights are rounded, too (an fp32 run's; a bf16 run's are bf16 already).
    assert torch.allclose(found, ours, atol=1e-5 if dtype == "fp32" else 2e-2)
    assert found.std() > 0.1  # not a constant
    assert "score.bias" not in load_file(target / "model.safetensors")


def test_folding_a_bias_loses_nothing_in_bf16():
    """Plain rounding of the moved bias would miss by 1e-3; errors carried on leave less than
    1e-6."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1024, generator=generator) / 32).bfloat16()
    shift = torch.randn(1024, generator=generator).bfloat16()
    moved = folded(shift, weight, 0.7321, torch.bfloat16)
    assert moved.dtype == torch.bfloat16
    grown = (weight.double() @ moved.double() - weight.double() @ shift.double()).item()
    assert grown == pytest.approx(0.7321, abs=1e-6)


def verified(folder, checkpoint_folder, precision):
    return verify.verify(folder, checkpoint_folder, precision)


def test_verify_writes_the_proof_and_sees_one_changed_bit(tmp_path):
    tiny_bloom(tmp_path / "hf", layers=2, vocab=VOCAB)
    convert_to(tmp_path)
    proof = run(verified, 1, 1, 1, tmp_path / "hf", tmp_path / "convert", "fp32")[0]
    assert proof == json.loads((tmp_path / "hf" / "PROOF.json").read_text()) and proof["proved"]
    assert len(proof["tensors"]) == 5 + 2 * 12 and 0 < proof["logits"]["max_difference"] < proof["logits"]["tolerance"]
    file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    command = [
        sys.executable,
        "-m",
        "conversion.verify",
        str(tmp_path / "hf"),
        str(tmp_path / "convert"),
        "--logits",
        "none",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        ended.returncode == 65
        and "not the same model: 1 of 29 tensors differ ['word_embeddings_layernorm.weight']" in ended.stderr
    )
    proof = json.loads((tmp_path / "hf" / "PROOF.json").read_text())
    differing = [name for name, row in proof["tensors"].items() if "differs" in row]
    assert not proof["proved"] and differing == ["word_embeddings_layernorm.weight"]


@pytest.mark.parametrize("make", [tiny_bloom, tiny_llama, tiny_qwen2, tiny_qwen3])
def test_verify_proves_an_exported_classifier(tmp_path, make):
    make(tmp_path / "hf", layers=2, vocab=VOCAB)
    write_tokenizer(tmp_path / "hf")
    convert_to(tmp_path)
    run(save_model, 1, 1, 1, tmp_path, "reward", "scalar", 0.4, 1, 1)
    target = export_from(tmp_path, "reward", "reward")
    proof = run(verified, 1, 1, 1, target, tmp_path / "reward", "fp32")[0]
    assert proof["proved"] and proof["head"] == "scalar", proof["logits"]
