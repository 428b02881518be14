"""Llama (Touvron et al. 2023) and what has its shape (SmolLM2, TinyLlama): its config.json, and its
tensors. Standard library only.

RMSNorm, rotary embedding, SwiGLU, grouped queries, no biases. megatron-core's linear_qkv is query,
key and value woven by key-value head; linear_gate_up is gate and up woven row by row. Each
tensor-parallel rank's rows then lie together, whatever its size, and nothing that divides tensors
(checkpoints, optimizer, generation) has to know that they are several.
"""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import COMMON, FIX, NUMBER, ConfigFile
from training.config.shape import EMBEDDING, Shape, Table, Weight
from training.errors import ConfigError

HUGGING_FACE = "Llama"
PREFIX, LAYER = "model.", "layers"
UNUSED = (".rotary_emb.inv_freq",)
DEFAULT_THETA = 10000.0
"""transformers' base of the rotary embedding where config.json names none."""


def read(config: ConfigFile) -> Shape:
    """Defaults are transformers' LlamaConfig's. Raises ConfigError, by name, for what we do not
    compute."""
    hidden, heads = config.whole_number("hidden_size"), config.whole_number("num_attention_heads")
    kv_heads = heads if config.values.get("num_key_value_heads") is None else config.whole_number("num_key_value_heads")
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    for name in ("sliding_window", "layer_types", "quantization_config"):
        config.only(name, None)
    config.only("hidden_act", "silu")
    config.types({**COMMON, "attention_dropout": (*NUMBER, type(None)), "pretraining_tp": (int, type(None))})
    if hidden % heads or hidden // heads % 2:
        raise ConfigError(
            f"{config.path}: hidden_size = {hidden} and num_attention_heads "
            f"= {heads}: expected an even head dimension; {FIX}"
        )
    config.only("head_dim", hidden // heads, None)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}; {FIX}"
        )
    return Shape(
        family="llama",
        layers=config.whole_number("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn_hidden=config.whole_number("intermediate_size"),
        vocab=config.whole_number("vocab_size"),
        norm_eps=config.epsilon("rms_norm_eps", 1e-6),
        tied=config.boolean("tie_word_embeddings", False),
        gated=True,
        rope_theta=_theta(config),
        max_positions=config.whole_number("max_position_embeddings", default=2048),
    )


def _theta(config: ConfigFile) -> float:
    """Base of the rotary embedding: ``rope_theta`` beside ``rope_scaling``, or, since transformers
    5, in ``rope_parameters``.

    transformers 5 takes the first of rope_scaling and rope_parameters that is not empty, and
    rope_theta from there, then from beside it; transformers 4 only from beside it. A file that
    names several must name the same.
    """
    tables = {name: config.table(name) for name in ("rope_scaling", "rope_parameters")}
    config.only("partial_rotary_factor", 1.0, 1)
    for name, table in tables.items():
        kinds = [table[key] for key in ("rope_type", "type") if key in table]
        if any(kind != "default" for kind in kinds) or table.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"{config.path}: {name} = {table}: scaled or partial rotary embeddings are not supported; take a model "
                'without them (rope_type = "default"), as Llama 2, TinyLlama and SmolLM2 are'
            )
    said = {f"{name}.rope_theta": table["rope_theta"] for name, table in tables.items() if "rope_theta" in table}
    if "rope_theta" in config.values and (not said or config.values["rope_theta"] is not None):
        said["rope_theta"] = config.values["rope_theta"]
    bases = {name: config.rope_base(name, value) for name, value in said.items()}
    if tables["rope_scaling"] and "rope_parameters.rope_theta" in bases and len(bases) == 1:
        bases["rope_scaling.rope_theta (not there: the default)"] = DEFAULT_THETA
    config.agree(bases)
    return next(iter(bases.values()), DEFAULT_THETA)


def table(shape: Shape) -> Table:
    hidden, wide, shared = shape.hidden, shape.ffn_hidden, shape.hidden // shape.heads * shape.kv_heads
    return Table(
        first=(Weight(EMBEDDING, {"embed_tokens.weight": (shape.vocab, hidden)}, 0),),
        layer=(
            Weight("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}),
            Weight(
                "self_attention.linear_qkv.weight",
                {
                    "self_attn.q_proj.weight": (hidden, hidden),
                    "self_attn.k_proj.weight": (shared, hidden),
                    "self_attn.v_proj.weight": (shared, hidden),
                },
                0,
                shape.kv_heads,
            ),
            Weight("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, hidden)}, 1),
            Weight("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": (hidden,)}),
            Weight(
                "mlp.linear_gate_up.weight",
                {"mlp.gate_proj.weight": (wide, hidden), "mlp.up_proj.weight": (wide, hidden)},
                0,
                wide,
            ),
            Weight("mlp.linear_fc2.weight", {"mlp.down_proj.weight": (hidden, wide)}, 1),
        ),
        last=(Weight("decoder.final_layernorm.weight", {"norm.weight": (hidden,)}),),
    )


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
