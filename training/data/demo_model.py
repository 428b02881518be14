"""The demo's starting model: a Hugging Face folder that looks like ``bigscience/bloom-7b1``'s, only
tiny and untrained.

Same files, same names of configuration keys and of tensors, a byte-level BPE with BLOOM's
pre-tokenizer: what the chain reads here is what it reads from the real checkpoint. The bytes depend
on the text, the shape and the seed only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from training.config.data import ModelConfig
from training.config.shape import family
from training.errors import ConfigError

SPECIAL = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
"""Name -> text. The ids are 0, 1, 2, 3 in this order, as in BLOOM."""
SPLIT = " ?[^(\\s|[.,!?…。，、।۔،])]+"
"""BLOOM's pre-tokenizer: words with the space before them; white space and sentence punctuation
stand alone."""


def write(folder: Path, texts: Iterable[str], model: ModelConfig, seed: int, rows: int = 0) -> None:
    """Write tokenizer (trained on ``texts``), configuration and random weights into ``folder``,
    which exists.

    ``rows``: rows of the embedding where it shall have more than the tokenizer has tokens, as
    BLOOM's own has.

    Raises ConfigError where the texts can't fill ``model.demo_vocab`` rows.
    """
    write_tokenizer(folder, texts, model)
    config = family(model.demo_family).demo(model) | ({"vocab_size": rows} if rows else {})
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {"_from_model_config": True}
        | {f"{name}_token_id": config[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    )
    _write_weights(folder, config, seed)


def write_tokenizer(folder: Path, texts: Iterable[str], model: ModelConfig) -> None:
    """Its files alone. Raises ConfigError where the texts can't fill ``model.demo_vocab`` rows."""
    tokenizer = train_tokenizer(texts, model.demo_vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = "BloomTokenizerFast" if model.demo_family == "bloom" else "PreTrainedTokenizerFast"
    tokens = {f"{name}_token": text for name, text in SPECIAL.items()}
    _write(folder / "special_tokens_map.json", tokens)
    _write(folder / "tokenizer_config.json", tokens | {"padding_side": "left", "tokenizer_class": kind})


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of exactly ``vocabulary`` rows: 4 special tokens, 256 bytes, merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"model.demo_vocab = {vocabulary}: the text gives {tokenizer.get_vocab_size()} tokens "
            "(260 without any merge); set model.demo_vocab to at least 261 and at most that"
        )
    return tokenizer


def _write_weights(folder: Path, config: dict, seed: int) -> None:
    """model.safetensors in fp32, named as in the published files (BLOOM's: ``h.0...`` without
    ``transformer.``), no tied lm_head."""
    import torch
    from safetensors.torch import save
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    prefix = "" if config["model_type"] == "bloom" else f"{model.base_model_prefix}."
    tensors = {prefix + name: tensor for name, tensor in model.base_model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
