"""The tokenizer of a Hugging Face folder through ``tokenizers`` alone: transformers would add seconds to every rank's start."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers

from training.settings import ConfigError


class Tokenizer:
    """Text <-> ids as transformers' AutoTokenizer of the same folder gives with ``add_special_tokens=False``.

    ``eos_id``, ``pad_id``: ids of the end of a reply and of padding; they differ, or PPO could not tell the end from the padding.
    Raises ConfigError for a folder without tokenizer.json, or without an EOS or a PAD of its own.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"model.checkpoint = {str(folder)!r}: no tokenizer.json in it; save the model's fast tokenizer there")
        self.file = file
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._special(folder, "eos")
        self.pad_id = self._special(folder, "pad")
        if self.pad_id == self.eos_id:
            raise ConfigError(f"{folder}: the padding token is the EOS token (id {self.eos_id}); give it a padding token of its own, "
                              'e.g. "pad_token": "<pad>" in tokenizer_config.json')

    @property
    def size(self) -> int:
        """Number of tokens, added ones too; the embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each, on all cores that ``tokenizers`` takes."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without the special tokens among them."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _special(self, folder: Path, name: str) -> int:
        """Id of the "eos" or "pad" token: the tokenizer's files say it by text, else the model's config.json by number."""
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read(folder / file).get(f"{name}_token")
            if token is not None:
                text = token["content"] if isinstance(token, dict) else token
                number = self._tokenizer.token_to_id(text)
                if number is None:
                    raise ConfigError(f"{folder / file}: {name}_token = {text!r} is not in tokenizer.json")
                return number
        number = _read(folder / "config.json").get(f"{name}_token_id")
        if not isinstance(number, int):
            raise ConfigError(f'{folder}: no {name} token; name one that tokenizer.json has, as "{name}_token" in tokenizer_config.json')
        return number


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
