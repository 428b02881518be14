"""The tokenizer of a Hugging Face folder through ``tokenizers`` alone: transformers would add
seconds to every rank's start."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import tokenizers

from training.errors import ConfigError
from training.files import hf_folder
from training.files.hf_folder import AGAIN, shown
from training.files.special_tokens import SpecialTokens

FILE = "tokenizer.json"
PARTS = {
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
"""Part of tokenizer.json -> a neutral value in its place."""


class Tokenizer:
    """Text <-> ids as tokenizer.json has it; training/data/trial.py compares transformers'.

    ``eos_id`` ends a reply. ``pad_id`` fills rows up, where nothing reads it: the folder's padding
    token, which may be EOS, or EOS where it names none. Raises ConfigError for a folder without
    tokenizer.json, with one that ``tokenizers`` can't load, or without an EOS.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.file = folder / FILE
        self._tokenizer = load(folder)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special_tokens = SpecialTokens.read(folder)
        self.eos_id = self.special_tokens.number("eos", self._tokenizer.token_to_id)
        self.pad_id = self.special_tokens.number("pad", self._tokenizer.token_to_id, self.eos_id)
        self.stop_ids: tuple[int, ...] = tuple(self.special_tokens.ends(self.eos_id))
        """Ids that end a reply: EOS, and those that the folder's files list with it."""
        self.bos = self._opening()
        """Ids that the post-processor puts before a text: BOS, or none."""
        self._anchor = self._before_replies()

    @property
    def size(self) -> int:
        """Number of tokens, added ones too; the embedding may have more rows."""
        return self._tokenizer.get_vocab_size()

    @property
    def ids(self) -> int:
        """One more than the highest id: the embedding's rows from there on stand for no token."""
        return self.highest()[1] + 1

    @property
    def filler(self) -> str:
        """A special token that pads behind EOS and can be told from it: PAD, else one that ends no
        text."""
        ids = [
            self.pad_id,
            *self.bos,
            *(self._tokenizer.token_to_id(text) for text in self.special_texts),
            self.size - 1,
        ]
        return self._tokenizer.id_to_token(next(number for number in ids if number != self.eos_id))

    @functools.cached_property
    def added(self) -> frozenset[int]:
        """Ids of the tokens that stand for one text of their own, such as a turn's mark."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @property
    def special_texts(self) -> list[str]:
        """Texts of the special tokens, by id."""
        return [
            token.content for _, token in sorted(self._tokenizer.get_added_tokens_decoder().items()) if token.special
        ]

    def encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Ids and offsets of each text alone, without BOS, on all cores that ``tokenizers``
        takes."""
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

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
        """Ids of texts that go on from a prompt: as inside a text, without a space of their own
        before them."""
        if not self._anchor:
            return self.encode_all(replies)
        before = self.encode(self._anchor)
        joined = self.encode_all([self._anchor + reply for reply in replies])
        return [
            ids[len(before) :] if ids[: len(before)] == before else self.encode(reply)
            for ids, reply in zip(joined, replies, strict=True)
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without the special tokens among them."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def text(self, ids: list[int]) -> str:
        """Text of ``ids`` with the special tokens among them."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def number(self, token: str) -> int | None:
        """Id of a token; None for a text that is none."""
        return self._tokenizer.token_to_id(token)

    def token(self, number: int) -> str:
        """Text of one token; its id where it has none."""
        return self._tokenizer.id_to_token(number) or str(number)

    def _opening(self) -> list[int]:
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        return [
            number
            for number, _ in itertools.takewhile(
                lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            )
        ]

    def _before_replies(self) -> str:
        """Text before which a reply is tokenised, and which is then cut off; "" where that changes
        nothing. SentencePiece's normalizers put a space before each text, so a reply that was
        tokenised apart would begin with two."""
        for anchor in ("\n", ":", "."):
            before, pairs = (
                self.encode(anchor),
                [(self.encode(anchor + text), self.encode(text)) for text in (" a", "a")],
            )
            if all(joined[: len(before)] == before for joined, _ in pairs):
                return anchor if any(joined[len(before) :] != apart for joined, apart in pairs) else ""
        return ""

    def highest(self) -> tuple[str, int]:
        """(token, id) of the highest id."""
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        return max(ids.items(), key=lambda item: item[1], default=("", -1))


def load(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json as ``tokenizers`` has it. Raises ConfigError, naming the part that this
    version can't load."""
    text = hf_folder.read_text(folder, FILE)
    if text is None:
        raise ConfigError(
            f"model.checkpoint = {str(folder)!r}: no tokenizer.json in it; save the model's fast "
            "tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    tokenizer = _loaded(text)
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return tokenizer
    table = hf_folder.parse(text, folder / FILE)
    sound_without = (
        name for name, nothing in PARTS.items() if not isinstance(_loaded(json.dumps(table | {name: nothing})), str)
    )
    part = next(sound_without, "")
    kind = table[part].get("type") if isinstance(table.get(part), dict) else None
    where = f": {part}{f' of type {shown(repr(kind))}' if kind else ''}" if part else ""
    raise ConfigError(
        f"model.checkpoint: {folder / FILE}{where} can't be loaded by tokenizers "
        f"{tokenizers.__version__} ({tokenizer}): damaged ({AGAIN}), or of a newer version (pip install "
        "--upgrade tokenizers transformers)"
    )


def _loaded(text: str) -> tokenizers.Tokenizer | str:
    """The tokenizer, or in one line why ``tokenizers`` can't load it. Its panics are no
    ``Exception``."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        return shown(" ".join(str(error).split()) or type(error).__name__, 200)
