"""What a config.json must say of a model that we compute exactly; everything else is refused by
name."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, LlamaConfig

from conversion.weights import entries, stored_name
from training.config.rope import Rope
from training.config.shape import Shape
from training.errors import ConfigError
from training.models import rotary

BLOOM_560M = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "architectures": ["BloomForCausalLM"],
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "unk_token_id": 0,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 1,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "transformers_version": "4.20.0",
    "use_cache": True,
    "vocab_size": 250880,
    "seq_length": 2048,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
    "rope_scaling": None,
    "rope_theta": 100000,
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED = json.loads((Path(__file__).parents[2] / "model_configs.json").read_text())
PUBLISHED["mistral-nemo"] = PUBLISHED["mistral-7b"] | {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "vocab_size": 131072,
    "parameters": 12247782400,
}
PUBLISHED["tinyllama-1.1b"] = SMOLLM2 | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 22,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "parameters": 1100048384,
}


def read(folder, published=SMOLLM2, **changes) -> Shape:
    values = {name: value for name, value in {**published, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return Shape.read(folder)


def test_a_llama_s_shape_in_both_spellings_of_the_rotary_base(tmp_path):
    old = read(tmp_path)
    assert (old.kv_heads, old.ffn_hidden, old.norm_eps, old.tied, old.rope, old.max_positions) == (
        3,
        1536,
        1e-5,
        True,
        Rope(1e5),
        8192,
    )
    assert not old.alibi and not old.score_bias and old.parameters() == 134515008
    assert old == read(
        tmp_path,
        rope_theta="absent",
        rope_scaling="absent",
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    assert old == read(tmp_path, head_dim=64, mlp_bias=False, sliding_window=None)
    names = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings")
    bare = read(tmp_path, **dict.fromkeys(names, "absent"))  # transformers' defaults
    assert (bare.kv_heads, bare.norm_eps, bare.rope, bare.tied, bare.max_positions) == (9, 1e-6, Rope(1e4), False, 2048)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling.low_freq_factor = None: expected a number above 0",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor = 1.0: expected more than low_freq_factor = 1.0",
        ),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor = 0.5: expected a number of at least 1"),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192.0}},
            "rope_scaling.original_max_position_embeddings = 8192.0: expected a whole number",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 1e5, "factor": 32.0}},
            "rope_scaling = .* and rope_parameters = .* contradict each other",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
            "rope_scaling = .* and rope_parameters = .* contradict each other",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = .*yarn"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}, "rope_scaling = .*linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; only 1.0"),
        ({"attention_bias": True}, "attention_bias = True; only False is supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096; only None"),
        ({"head_dim": 63}, "head_dim = 63: expected an even number"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
        ({"attention_bias": 0}, "attention_bias = 0; only False"),
        ({"head_dim": 64.0}, "head_dim = 64.0: expected a whole number"),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide num_attention_heads = 9"),
        ({"num_attention_heads": 7}, "hidden_size = 576 and num_attention_heads = 7"),
        ({"quantization_config": {"quant_method": "gguf"}}, "quantization_config = "),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number"),
        ({"intermediate_size": "absent"}, "intermediate_size"),
        ({"model_type": "gemma"}, "model_type = 'gemma'; expected one of bloom, llama"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)


def test_what_is_published_and_what_transformers_writes_is_accepted(tmp_path):
    published = read(tmp_path, BLOOM_560M)
    assert (published.layers, published.hidden, published.heads, published.vocab, published.norm_eps) == (
        24,
        1024,
        16,
        250880,
        1e-5,
    )
    assert published == read(tmp_path, BLOOM_560M, n_embed="absent", hidden_size=1024, n_head=16, num_hidden_layers=24)
    instruct = read(
        tmp_path,
        rope_interleaved=False,
        pretraining_tp=1,
        initializer_range=0.041666666666666664,
        use_cache=True,
        head_dim=64,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=None,
        torch_dtype="bfloat16",
    )
    assert (
        instruct
        == read(tmp_path)
        == read(tmp_path, rope_theta=1e5, rope_scaling={}, rope_parameters={"rope_theta": 100000})
    )
    assert instruct == read(tmp_path, rope_theta=None, rope_parameters={"rope_theta": 1e5})
    assert read(tmp_path, rope_theta=3580165449.0).rope == Rope(3580165449.0), "a Llama 3 for a million positions"
    for model, config in (
        (read, LlamaConfig(**SMOLLM2)),
        (partial(read, published=BLOOM_560M), BloomConfig(**BLOOM_560M)),
    ):
        expected = model(tmp_path)
        for diff in (True, False):
            config.to_json_file(tmp_path / "config.json", use_diff=diff)
            assert Shape.read(tmp_path) == expected


def test_llama_3_s_rotary_embedding_in_both_spellings(tmp_path):
    expected = Rope(1e5, "llama3", 8.0, 1.0, 4.0, 8192)
    assert read(tmp_path, rope_scaling=LLAMA3).rope == expected
    assert read(tmp_path, rope_theta="absent", rope_parameters={**LLAMA3, "rope_theta": 1e5}).rope == expected
    assert read(tmp_path, rope_scaling=LLAMA3, rope_parameters={**LLAMA3, "rope_theta": 1e5}).rope == expected
    short = {name: value for name, value in LLAMA3.items() if not name.startswith("original")}
    # transformers takes max_position_embeddings instead
    assert read(tmp_path, rope_scaling=short).rope == expected


@pytest.mark.parametrize("name", [name for name, values in PUBLISHED.items() if values["model_type"] != "bloom"])
def test_published_models_are_read_as_transformers_reads_them(tmp_path, name):
    """Parameters, and every tensor's name and size, are those of transformers' model of the same
    config.json, built without memory; what transformers writes of it is read alike; its rotary
    rates are ours to the last bit."""
    values = {key: value for key, value in PUBLISHED[name].items() if key != "parameters"}
    shape = read(tmp_path, values)
    assert shape.parameters() == PUBLISHED[name]["parameters"]
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    sizes = {key: tuple(tensor.shape) for key, tensor in theirs.named_parameters()}
    ours = {stored_name(shape, part): size for entry in entries(shape) for part, size in entry.parts.items()}
    assert ours == sizes
    rates = type(theirs.model.rotary_emb)(config).inv_freq
    assert torch.equal(rates, rotary.rates(shape.rope, shape.head_dim, torch.device("cpu")))
    for diff in (True, False):
        config.to_json_file(tmp_path / "config.json", use_diff=diff)
        assert Shape.read(tmp_path) == shape


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2.5-0.5b", {"use_sliding_window": True}, "max_window_layers = 21: layers 21 to 23 attend to a window"),
        (
            "qwen3-0.6b",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
            "layers 0 to 27 attend to a window",
        ),
        ("qwen3-0.6b", {"layer_types": ["sliding_attention"] * 28}, 'expected 28 times "full_attention"'),
        ("qwen3-0.6b", {"attention_bias": True}, "attention_bias = True; only False"),
        ("qwen2.5-0.5b", {"use_mrope": True}, "use_mrope = True; only False"),
        ("mistral-7b", {"sliding_window": 4096}, "sliding_window = 4096: expected null; take a model without windows"),
        ("mistral-7b", {"sliding_window": "absent"}, "sliding_window = 'not there .4096 in transformers.'"),
        ("qwen3-0.6b", {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe'; expected one of bloom, llama"),
    ],
)
def test_a_window_or_a_bias_that_is_used_is_refused(tmp_path, name, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, PUBLISHED[name], **changes)


def test_a_window_that_no_layer_uses_is_accepted(tmp_path):
    plain = read(tmp_path, PUBLISHED["qwen2.5-0.5b"])
    assert plain == read(tmp_path, PUBLISHED["qwen2.5-0.5b"], use_sliding_window=True, max_window_layers=24)
    assert plain == read(tmp_path, PUBLISHED["qwen2.5-0.5b"], layer_types=["full_attention"] * 24)


WHOLE = (True, 256.0, "256", 0, -1, [4], math.nan, 10**400)
WRONG = {
    "hidden_size": WHOLE,
    "num_attention_heads": WHOLE,
    "num_hidden_layers": WHOLE,
    "intermediate_size": (*WHOLE, None),
    "max_position_embeddings": (*WHOLE, None),
    "num_key_value_heads": WHOLE,
    "vocab_size": WHOLE,
    "rms_norm_eps": ("1e-5", None, -1.0, 0.0, math.nan, math.inf, True, 1, [1e-5]),
    "rope_theta": ("10k", None, -1.0, 1, math.nan, math.inf, True, 10**400),
    "tie_word_embeddings": (None, 1, "true"),
    "rope_parameters": ("default", [], 2.0, True, {"rope_theta": math.nan}, {"rope_theta": None}),
    "rope_scaling": ("default", [{}], 2.0),
    "use_cache": (1, None),
    "initializer_range": ("0.02", math.nan),
    "pad_token_id": ("0", True),
    "eos_token_id": ({},),
}


@pytest.mark.parametrize(
    ("published", "name", "value"),
    [
        *((SMOLLM2, name, value) for name, values in WRONG.items() for value in values),
        *(
            (BLOOM_560M, name, value)
            for name in ("n_embed", "num_attention_heads", "n_layer", "vocab_size")
            for value in (*WHOLE, None)
        ),
        *((BLOOM_560M, "layer_norm_epsilon", value) for value in WRONG["rms_norm_eps"]),
        (BLOOM_560M, "hidden_dropout", "0.1"),
        (BLOOM_560M, "tie_word_embeddings", 1),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_named_with_what_was_expected(tmp_path, published, name, value):
    with pytest.raises(
        ConfigError, match=rf"config.json: {name}\S* = .*: expected .*; correct config.json, or download it again"
    ):
        read(tmp_path, published, **{name: value})


@pytest.mark.parametrize(
    ("published", "changes", "message"),
    [
        (
            SMOLLM2,
            {"rope_theta": 500, "rope_parameters": {"rope_theta": 777}, "rope_scaling": {"rope_type": "default"}},
            r"rope_parameters.rope_theta = 777.0 and rope_theta = 500.0 contradict each other",
        ),
        (
            SMOLLM2,
            {"rope_theta": 500, "rope_scaling": {"rope_theta": 777}},
            "rope_scaling.rope_theta = 777.0 and rope_theta = 500.0",
        ),
        (
            SMOLLM2,
            {"rope_theta": "absent", "rope_parameters": {"rope_theta": 777}, "rope_scaling": {"rope_type": "default"}},
            r"rope_parameters.rope_theta = 777.0 and rope_scaling.rope_theta \(not there: the default\) = 10000.0 "
            r"contradict",
        ),
        (BLOOM_560M, {"hidden_size": 64}, "hidden_size = 64 and n_embed = 1024 contradict"),
        (BLOOM_560M, {"num_hidden_layers": 5}, "n_layer = 24 and num_hidden_layers = 5 contradict"),
        (BLOOM_560M, {"n_head": 8}, "n_head = 8 and num_attention_heads = 16 contradict"),
        (BLOOM_560M, {"num_attention_heads": 15}, "expected a multiple of the heads"),
        (BLOOM_560M, {"quantization_config": {"load_in_8bit": True}}, "quantization_config = "),
    ],
)
def test_values_that_contradict_each_other_are_refused(tmp_path, published, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, published, **changes)


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"vocab_size": ' + b"1" * 5000 + b"}", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        ConfigError, match="config.json (can't be read as JSON|holds no JSON object|is not UTF-8).*; download it again"
    ):
        Shape.read(tmp_path)
