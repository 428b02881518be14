"""The demo's starting model: a Hugging Face folder that looks like ``bigscience/bloom-7b1``'s, only tiny and untrained.

Same files, same names of configuration keys and of tensors, a byte-level BPE with BLOOM's pre-tokenizer: what the chain reads here
is what it reads from the real checkpoint. The bytes depend on the text, the shape and the seed only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from training.config import ModelConfig
from training.settings import ConfigError

SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
"""Name -> text; the ids are 0, 1, 2, 3 in this order, as in BLOOM."""
SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
"""BLOOM's pre-tokenizer: words with the space before them; white space and sentence punctuation stand alone."""


def write(folder: Path, texts: Iterable[str], model: ModelConfig, seed: int, rows: int = 0) -> None:
    """Write tokenizer (trained on ``texts``), configuration and random weights into ``folder``, which exists.

    ``rows``: rows of the embedding where it shall have more than the tokenizer has tokens, as BLOOM's own has.

    Raises ConfigError where the texts can't fill ``model.demo_vocab`` rows.
    """
    tokenizer = train_tokenizer(texts, model.demo_vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {f"{name}_token": text for name, text in SPECIAL.items()}
    _write(folder / "special_tokens_map.json", tokens)
    _write(folder / "tokenizer_config.json", tokens | {"padding_side": "left", "tokenizer_class": "BloomTokenizerFast"})
    config = bloom_config(model) | ({"vocab_size": rows} if rows else {})
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"_from_model_config": True}
           | {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")})
    _write_weights(folder, config, seed)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of exactly ``vocabulary`` rows: 4 special tokens, 256 bytes, merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIAL.values()), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigError(f"model.demo_vocab = {vocabulary}: the text gives {tokenizer.get_vocab_size()} tokens "
                          f"(260 without any merge); set model.demo_vocab to at least 261 and at most that")
    return tokenizer


def bloom_config(model: ModelConfig) -> dict:
    """config.json with the keys of ``bigscience/bloom-7b1`` (which are older than those that transformers writes today)."""
    return {
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["BloomForCausalLM"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": model.demo_hidden,
        "n_inner": None,
        "n_layer": model.demo_layers,
        "num_attention_heads": model.demo_heads,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": model.demo_vocab,
    }


def _write_weights(folder: Path, config: dict, seed: int) -> None:
    """model.safetensors in fp32, its tensors named as in BLOOM's: ``h.0...`` without ``transformer.``, no tied lm_head."""
    import torch
    from safetensors.torch import save
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(seed)
    model = BloomForCausalLM(BloomConfig(**config))
    (folder / "model.safetensors").write_bytes(save(model.transformer.state_dict(), metadata={"format": "pt"}))


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
