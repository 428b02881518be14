"""Llama (Touvron et al. 2023) and what has its shape (Llama 3, SmolLM2, TinyLlama): its
config.json, and its tensors. Standard library only.

RMSNorm, rotary embedding, SwiGLU, grouped queries, no biases. megatron-core's linear_qkv is query,
key and value woven by key-value head; linear_gate_up is gate and up woven row by row. Each
tensor-parallel rank's rows then lie together, whatever its size, and nothing that divides tensors
(checkpoints, optimizer, generation) has to know that they are several.

Mistral, Qwen 2 and Qwen 3 are this with a few changes: their files use ``shape`` and ``table``.
"""

from __future__ import annotations

from training.config.data import ModelConfig
from training.config.hf_config import COMMON, FIX, NUMBER, ConfigFile
from training.config.rope import Rope
from training.config.shape import EMBEDDING, Shape, Table, Weight
from training.errors import ConfigError

HUGGING_FACE = "Llama"
PREFIX, LAYER = "model.", "layers"
UNUSED = (".rotary_emb.inv_freq",)


def read(config: ConfigFile) -> Shape:
    """Raises ConfigError, by name, for what we do not compute."""
    for name in ("attention_bias", "mlp_bias"):
        config.only(name, False)
    for name in ("sliding_window", "layer_types"):
        config.only(name, None)
    config.types({"pretraining_tp": (int, type(None))})
    return shape(config, "llama", positions=2048)


def shape(
    config: ConfigFile,
    family: str,
    *,
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
) -> Shape:
    """The shape of a model of Llama's kind. ``positions``, ``kv_heads`` and ``head_dim`` are
    transformers' defaults of max_position_embeddings, num_key_value_heads and head_dim for
    ``family`` (None: the number of heads; hidden_size over the number of heads).

    Raises ConfigError for what we do not compute.
    """
    config.only("quantization_config", None)
    config.only("hidden_act", "silu")
    config.types({**COMMON, "attention_dropout": (*NUMBER, type(None))})
    hidden, heads = config.whole_number("hidden_size"), config.whole_number("num_attention_heads")
    head_dim = _head_dim(config, hidden, heads, head_dim)
    kv_heads = config.values.get("num_key_value_heads", kv_heads)
    kv_heads = heads if kv_heads is None else config.whole_number("num_key_value_heads", default=kv_heads)
    positions = config.whole_number("max_position_embeddings", default=positions)
    if heads % kv_heads:
        raise ConfigError(
            f"{config.path}: num_key_value_heads = {kv_heads} does not divide num_attention_heads = {heads}; {FIX}"
        )
    return Shape(
        family=family,
        layers=config.whole_number("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden=config.whole_number("intermediate_size"),
        vocab=config.whole_number("vocab_size"),
        norm_eps=config.epsilon("rms_norm_eps", 1e-6),
        tied=config.boolean("tie_word_embeddings", False),
        gated=True,
        rope=Rope.read(config, positions),
        qk_norm=qk_norm,
        max_positions=positions,
    )


def _head_dim(config: ConfigFile, hidden: int, heads: int, default: int | None) -> int:
    named = config.values.get("head_dim", default)
    if named is None and (hidden % heads or hidden // heads % 2):
        raise ConfigError(
            f"{config.path}: hidden_size = {hidden} and num_attention_heads "
            f"= {heads}: expected an even head dimension; {FIX}"
        )
    dim = hidden // heads if named is None else config.whole_number("head_dim", default=named)
    if dim % 2:
        raise config.wrong("head_dim", dim, "an even number")
    return dim


def full_attention(config: ConfigFile) -> None:
    """Raises ConfigError where a layer of a Qwen attends to a window alone: from
    ``max_window_layers`` on, if ``use_sliding_window``. A ``sliding_window`` that is not used may
    have any value."""
    config.types({"sliding_window": (int, type(None)), "max_window_layers": (int,)})
    layers = config.whole_number("num_hidden_layers")
    kinds = config.values.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * layers:
        raise config.wrong("layer_types", kinds, f'{layers} times "full_attention"', "take a model without windows")
    if kinds is None and config.boolean("use_sliding_window", False) and config.values.get("sliding_window", 1):
        first = config.values.get("max_window_layers", 28)
        if first < layers:
            raise ConfigError(
                f"{config.path}: use_sliding_window = True and max_window_layers = {first}: layers {first} to "
                f"{layers - 1} attend to a window, which is not supported; take a model without windows"
            )


def table(shape: Shape, qkv_bias: bool = False) -> Table:
    hidden, wide, shared = shape.hidden, shape.ffn_hidden, shape.head_dim * shape.kv_heads
    projections = {"q_proj": shape.attention_width, "k_proj": shared, "v_proj": shared}

    def qkv(kind: str, *columns: int) -> Weight:
        parts = {f"self_attn.{name}.{kind}": (rows, *columns) for name, rows in projections.items()}
        return Weight(f"self_attention.linear_qkv.{kind}", parts, 0, shape.kv_heads)

    def head_norm(name: str) -> Weight:
        return Weight(f"self_attention.{name}_layernorm.weight", {f"self_attn.{name}_norm.weight": (shape.head_dim,)})

    return Table(
        first=(Weight(EMBEDDING, {"embed_tokens.weight": (shape.vocab, hidden)}, 0),),
        layer=(
            Weight("input_layernorm.weight", {"input_layernorm.weight": (hidden,)}),
            qkv("weight", hidden),
            *([qkv("bias")] if qkv_bias else []),
            *([head_norm("q"), head_norm("k")] if shape.qk_norm else []),
            Weight(
                "self_attention.linear_proj.weight", {"self_attn.o_proj.weight": (hidden, shape.attention_width)}, 1
            ),
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
