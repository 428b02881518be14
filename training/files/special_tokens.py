"""What the files of a model say of the tokens that end a reply, begin a text and fill a row.
Standard library only.

Three kinds of file say it: the tokenizer's (by text), config.json and generation_config.json (by
number, several ends as a list). Training goes by the tokenizer's end; what the others say is
compared with it, and an export repeats it.
"""

from __future__ import annotations

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
    """What a folder's files say; every number is the number of a row of the embedding."""

    folder: Path
    texts: dict[str, str]
    """"eos", "pad", "bos" -> text, as the tokenizer's files have it."""
    numbers: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """File (of CONFIGS) -> {"eos": [2], ...}: what it says by number."""

    @classmethod
    def read(cls, folder: str | Path, rows: int = 0) -> SpecialTokens:
        """``rows`` of the embedding; 0 = not known. Raises ConfigError, naming file and field, for
        what is no token."""
        folder = Path(folder)
        return cls(folder, _texts(folder), {name: _numbers(folder, name, rows) for name in CONFIGS})

    def number(self, name: str, ids, default: int | None = None) -> int:
        """Id of "eos" or "pad": the tokenizer's files say it by text, else config.json by number,
        else ``default``. ``ids``: text -> id or None. Raises ConfigError where none does."""
        if name in self.texts:
            number = ids(self.texts[name])
            if number is None:
                raise ConfigError(
                    f"model.checkpoint: {self.folder}: {name}_token = {shown(repr(self.texts[name]))} of "
                    "the tokenizer's files is not in tokenizer.json; name one that is, or add it there"
                )
            return number
        numbers = self.numbers["config.json"].get(name)
        if not numbers and default is not None:
            return default
        if not numbers:
            raise ConfigError(
                f"model.checkpoint: {self.folder} names no {name} token; name one that tokenizer.json "
                f'has, as "{name}_token" in tokenizer_config.json'
            )
        return numbers[0]

    def notes(self, eos: int) -> list[str]:
        """Where config.json or generation_config.json does not name ``eos`` among the ends: what an
        export will do."""
        return [
            f"{self.folder / file}: eos_token_id = {shown(_single(ends))}, but the tokenizer ends a "
            f"text with {eos}: training ends replies with {eos}, and the export's files will say so"
            for file, said in self.numbers.items()
            if (ends := said.get("eos")) and eos not in ends
        ]

    def ends(self, eos: int) -> int | list[int]:
        """eos_token_id of an export: ``eos``, with the further ends that were named with it."""
        lists = [said["eos"] for said in reversed(self.numbers.values()) if eos in said.get("eos", ())]
        return _single(lists[0]) if lists else eos


def _texts(folder: Path) -> dict[str, str]:
    """Raises ConfigError where a token is no text, or two files name different ends."""
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


def _numbers(folder: Path, file: str, rows: int) -> dict[str, list[int]]:
    """Raises ConfigError for ids that the embedding has no row for, or that are no whole
    numbers."""
    values, numbers = hf_folder.json_object(folder, file) or {}, {}
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
            numbers[key.removesuffix("_token_id")] = list(dict.fromkeys(ids))
    return numbers


def _single(ids: list[int]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else ids
