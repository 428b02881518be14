"""What a config.json must say of a model that we compute exactly; everything else is refused by name."""

import json

import pytest

from training.settings import ConfigError
from training.shape import Shape

SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
           "num_hidden_layers": 30, "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "hidden_act": "silu",
           "attention_bias": False, "tie_word_embeddings": True, "vocab_size": 49152, "rope_scaling": None, "rope_theta": 100000}


def read(folder, **changes) -> Shape:
    values = {name: value for name, value in {**SMOLLM2, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return Shape.read(folder)


def test_a_llama_s_shape_in_both_spellings_of_the_rotary_base(tmp_path):
    old = read(tmp_path)
    assert (old.groups, old.ffn, old.eps, old.tied, old.theta, old.positions) == (3, 1536, 1e-5, True, 100000.0, 8192)
    assert not old.alibi and not old.score_bias and old.parameters() == 134515008
    assert old == read(tmp_path, rope_theta="absent", rope_scaling="absent", rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    assert old == read(tmp_path, head_dim=64, mlp_bias=False, sliding_window=None)
    names = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings")
    bare = read(tmp_path, **dict.fromkeys(names, "absent"))  # transformers' defaults
    assert (bare.groups, bare.eps, bare.theta, bare.tied, bare.positions) == (9, 1e-6, 10000.0, False, 2048)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling = .*llama3.* scaled or partial rotary embeddings are not"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = .*yarn"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_theta": "10k"}, "rope_theta = '10k': expected a number"),
    ({"attention_bias": True}, "attention_bias = True; only False is supported"),
    ({"mlp_bias": True}, "mlp_bias = True"), ({"sliding_window": 4096}, "sliding_window = 4096; only None"),
    ({"head_dim": 128}, "head_dim = 128; only 64 is supported"), ({"hidden_act": "gelu"}, "hidden_act = 'gelu'; only 'silu'"),
    ({"num_key_value_heads": 4}, "num_key_value_heads = 4 does not divide num_attention_heads = 9"),
    ({"num_attention_heads": 7}, "hidden_size = 576 and num_attention_heads = 7"),
    ({"quantization_config": {"quant_method": "gguf"}}, "quantization_config = "),
    ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number"), ({"intermediate_size": "absent"}, "intermediate_size"),
    ({"model_type": "mistral"}, "model_type = 'mistral'; expected one of bloom, llama")])
def test_what_is_not_computed_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **changes)
