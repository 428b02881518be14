"""The special tokens of a model: EOS ends a reply, BOS begins a text, PAD fills a row.

The tokenizer's files name them by text, config.json and generation_config.json by id (several EOS
as a list). Training uses the tokenizer's EOS. The ids of the other files are compared with it, and
an export repeats them. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from training.errors import ConfigError
from training.files import hf_folder
from training.files.hf_folder import AGAIN, shown

CONFIGS = ("config.json", "generation_config.json")
NAMES = ("eos", "pad", "bos")
LIKE_IDS = (
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "unk_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens that a folder's files name. Every id is a row of the embedding."""

    folder: Path
    texts: dict[str, str]
    """"eos", "pad", "bos" -> text in the tokenizer's files."""
    ids: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """File (of CONFIGS) -> {"eos": [2], ...}: ids in that file."""

    @classmethod
    def read(cls, folder: str | Path, rows: int = 0) -> SpecialTokens:
        """Read a model folder. ``rows``: rows of the embedding, 0 = unknown. Raises ConfigError
        that names file and field for a value that is no token."""
        folder = Path(folder)
        return cls(folder, _texts(folder), {name: _ids(folder, name, rows) for name in CONFIGS})

    def number(self, name: str, token_to_id: Callable[[str], int | None], default: int | None = None) -> int:
        """Id of "eos" or "pad": by the text in the tokenizer's files, else by the id in
        config.json, else ``default``. Raises ConfigError where all three are missing, and for a
        text that ``token_to_id`` does not know."""
        if name in self.texts:
            number = token_to_id(self.texts[name])
            if number is None:
                raise ConfigError(
                    f"model.checkpoint: {self.folder}: {name}_token = {shown(repr(self.texts[name]))} of "
                    "the tokenizer's files is not in tokenizer.json; name one that is, or add it there"
                )
            return number
        ids = self.ids["config.json"].get(name)
        if not ids and default is not None:
            return default
        if not ids:
            raise ConfigError(
                f"model.checkpoint: {self.folder} names no {name} token; name one that tokenizer.json "
                f'has, as "{name}_token" in tokenizer_config.json'
            )
        return ids[0]

    def notes(self, eos: int) -> list[str]:
        """A note for each of config.json and generation_config.json whose EOS ids lack ``eos``: the
        export will change them."""
        return [
            f"{self.folder / file}: eos_token_id = {shown(_single(ends))}, but the tokenizer ends a "
            f"text with {eos}: training ends replies with {eos}, and the export's files will say so"
            for file, ids in self.ids.items()
            if (ends := ids.get("eos")) and eos not in ends
        ]

    def ends(self, eos: int) -> list[int]:
        """Ids that end a reply: ``eos`` and the other EOS ids that a file lists with it."""
        lists = [ids["eos"] for ids in reversed(self.ids.values()) if eos in ids.get("eos", ())]
        return lists[0] if lists else [eos]


def _texts(folder: Path) -> dict[str, str]:
    """Name ("eos", "pad", "bos") -> text. Raises ConfigError where a token is no text, or two files
    name different EOS."""
    texts: dict[str, str] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        values = hf_folder.json_object(folder, file) or {}
        for name in NAMES:
            token = values.get(f"{name}_token")
            text = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not hf_folder.is_text(text) or not text:
                raise ConfigError(
                    f"model.checkpoint: {folder / file}: {name}_token = {shown(token)}: expected a text, "
                    f"or an object with a text as its content; correct it, or {AGAIN}"
                )
            if name == "eos" and texts.get(name, text) != text:
                raise ConfigError(
                    f"model.checkpoint: {folder / file}: eos_token = {shown(repr(text))}, "
                    f"tokenizer_config.json says {shown(repr(texts[name]))}; keep the one that the "
                    "model was trained with"
                )
            texts.setdefault(name, text)
    return texts


def _ids(folder: Path, file: str, rows: int) -> dict[str, list[int]]:
    """Name ("eos", "pad", "bos") -> ids in ``file``. Raises ConfigError for an id that is no whole
    number or no row of the embedding."""
    values, ids_of = hf_folder.json_object(folder, file) or {}, {}
    for key in LIKE_IDS:
        value = values.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) and key in ("eos_token_id", "forced_eos_token_id") else [value]
        if not ids or not all(type(number) is int and 0 <= number < (rows or 2**31) for number in ids):
            most = f"below vocab_size, {rows}" if rows else "of a token"
            raise ConfigError(
                f"model.checkpoint: {folder / file}: {key} = {shown(value)}: expected a whole number "
                f"from 0, {most}; set it to the id of a token that tokenizer.json has, or to null"
            )
        if key.removesuffix("_token_id") in NAMES:
            ids_of[key.removesuffix("_token_id")] = list(dict.fromkeys(ids))
    return ids_of


def _single(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids
