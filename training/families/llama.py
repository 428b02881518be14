"""Llama (Touvron et al. 2023) and what has its shape (SmolLM2, TinyLlama): its config.json, and its tensors. Standard library only.

RMSNorm, rotary embedding, SwiGLU, grouped queries, no biases. megatron-core's linear_qkv is query, key and value woven by key-value head;
linear_gate_up is gate and up woven row by row. Each tensor-parallel rank's rows then lie together, whatever its size, and nothing that
divides tensors (checkpoints, optimizer, generation) has to know that they are several.
"""

from __future__ import annotations

from training.data.config import ModelConfig
from training.settings import ConfigError
from training.shape import EMBEDDING, ConfigFile, Shape, Table, Weight

HUGGING_FACE = "Llama"
PREFIX, LAYER = "model.", "layers"


def read(config: ConfigFile) -> Shape:
    """Defaults are transformers' LlamaConfig's. Raises ConfigError, by name, for what we do not compute."""
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    groups = config.values.get("num_key_value_heads") or heads
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    for name in ("sliding_window", "layer_types", "quantization_config"):
        config.only(name, None)
    config.only("hidden_act", "silu")
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(f"{config.path}: hidden_size = {hidden} and num_attention_heads = {heads}: expected an even head dimension")
    config.only("head_dim", hidden // heads, None)
    if not isinstance(groups, int) or groups < 1 or heads % groups:
        raise ConfigError(f"{config.path}: num_key_value_heads = {groups!r} does not divide num_attention_heads = {heads}")
    return Shape(family="llama", layers=config.whole("num_hidden_layers"), hidden=hidden, heads=heads, groups=groups,
                 ffn=config.whole("intermediate_size"), vocab=config.whole("vocab_size"), eps=config.values.get("rms_norm_eps", 1e-6),
                 tied=config.truth("tie_word_embeddings", False), gated=True, theta=_theta(config),
                 positions=config.values.get("max_position_embeddings", 2048))


def _theta(config: ConfigFile) -> float:
    """Base of the rotary embedding: ``rope_theta`` beside ``rope_scaling``, or, since transformers 5, in ``rope_parameters``."""
    found = config.values.get("rope_theta", 10000.0)
    for name in ("rope_parameters", "rope_scaling"):
        table = config.values.get(name) or {}
        kind = table.get("rope_type", table.get("type", "default"))
        if kind != "default" or table.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{config.path}: {name} = {table}: scaled or partial rotary embeddings are not supported; take a model "
                              'without them (rope_type = "default"), as Llama 2, TinyLlama and SmolLM2 are')
        found = table.get("rope_theta", found)
    if not isinstance(found, int | float) or isinstance(found, bool) or found <= 1:
        raise ConfigError(f"{config.path}: rope_theta = {found!r}: expected a number above 1")
    return float(found)


def table(shape: Shape) -> Table:
    hidden, wide, shared = shape.hidden, shape.ffn, shape.hidden // shape.heads * shape.groups
    return Table(
        first=(Weight(EMBEDDING, {"embed_tokens.weight": (shape.vocab, hidden)}, 0),),
        layer=(Weight("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}),
               Weight("self_attention.linear_qkv.weight", {"self_attn.q_proj.weight": (hidden, hidden), "self_attn.k_proj.weight":
                      (shared, hidden), "self_attn.v_proj.weight": (shared, hidden)}, 0, shape.groups),
               Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, hidden)}, 1),
               Weight("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (hidden,)}),
               Weight("mlp.linear_gate_up.weight", {"mlp.gate_proj.weight": (wide, hidden), "mlp.up_proj.weight": (wide, hidden)}, 0, wide),
               Weight("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, wide)}, 1)),
        last=(Weight("decoder.final_layernorm.weight", {"norm.weight": (hidden,)}),))


def demo(model: ModelConfig) -> dict:
    """config.json with the keys of ``HuggingFaceTB/SmolLM2-135M``: one or two key-value heads."""
    heads = model.demo_heads
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": model.demo_hidden,
        "initializer_range": 0.02,
        "intermediate_size": 8 * model.demo_hidden // 3,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": model.demo_layers,
        "num_key_value_heads": 2 if heads % 2 == 0 else 1,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": model.demo_vocab,
    }
