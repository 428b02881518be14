"""The tokenizer of a Hugging Face folder through ``tokenizers`` alone: transformers would add seconds to every rank's start."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import tokenizers

from training.settings import ConfigError


class Tokenizer:
    """Text <-> ids as transformers' AutoTokenizer of the same folder gives them.

    ``eos_id`` ends a reply. ``pad_id`` fills rows up, where nothing reads it: the folder's padding
    token, which may be EOS, or EOS where it names none.
    Raises ConfigError for a folder without tokenizer.json, or without an EOS.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"model.checkpoint = {str(folder)!r}: no tokenizer.json in it; "
                              "save the model's fast tokenizer there")
        self.file = file
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._special(folder, "eos")
        self.pad_id = self._special(folder, "pad", self.eos_id)
        self.bos = self._opening()
        """Ids that the post-processor puts before a text: BOS, or none."""
        self._anchor = self._before_replies()

    @property
    def size(self) -> int:
        """Number of tokens, added ones too; the embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def filler(self) -> str:
        """A special token that pads behind EOS and can be told from it: PAD, else one that ends no text."""
        special = [token.content for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items()) if token.special]
        ids = [self.pad_id, *self.bos, *(self._tokenizer.token_to_id(text) for text in special), self.size - 1]
        return self._tokenizer.id_to_token(next(number for number in ids if number != self.eos_id))

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, without BOS."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """``encode`` of each, on all cores that ``tokenizers`` takes."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """Ids that a row begins with: BOS, once, and the prompt."""
        count = len(self.bos)
        return [ids if ids[:count] == self.bos else self.bos + ids for ids in self.encode_all(prompts)]

    def encode_replies(self, replies: list[str]) -> list[list[int]]:
        """Ids of texts that go on from a prompt: as inside a text, without a space of their own before them."""
        if not self._anchor:
            return self.encode_all(replies)
        before = self.encode(self._anchor)
        joined = self.encode_all([self._anchor + reply for reply in replies])
        return [ids[len(before):] if ids[:len(before)] == before else self.encode(reply)
                for ids, reply in zip(joined, replies, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without the special tokens among them."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _opening(self) -> list[int]:
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        return [number for number, _ in itertools.takewhile(
            lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))]

    def _before_replies(self) -> str:
        """Text before which a reply is tokenised, and which is then cut off; "" where that changes nothing. SentencePiece's
        normalizers put a space before each text, so a reply that was tokenised apart would begin with two."""
        for anchor in ("\n", ":", "."):
            before, pairs = self.encode(anchor), [(self.encode(anchor + text), self.encode(text)) for text in (" a", "a")]
            if all(joined[:len(before)] == before for joined, _ in pairs):
                return anchor if any(joined[len(before):] != apart for joined, apart in pairs) else ""
        return ""

    def _special(self, folder: Path, name: str, default: int | None = None) -> int:
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
            if default is not None:
                return default
            raise ConfigError(f'{folder}: no {name} token; name one that tokenizer.json has, as "{name}_token" in tokenizer_config.json')
        return number


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
