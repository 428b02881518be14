"""``python -m training.data.trial FOLDER ROWS SOURCE``: will the tokenizer work in all later
stages?

Two libraries read a tokenizer's files: ``tokenizers`` (training) and transformers (evaluation, and
users of an export). They are compared on the first rows of SOURCE (a data file, or "demo") and on
the role marks. Every id must be below ROWS, the embedding's rows. Prints a JSON list of notes for
the user; exit status 65 and one line for a tokenizer that can't work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from training.config.schema import usage
from training.data import dialogue, formats
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError, DataError
from training.files import hf_folder
from training.files.hf_folder import shown

SAMPLES = (
    dialogue.HUMAN,
    dialogue.CUE,
    f"{dialogue.HUMAN} What is 12 + 345?{dialogue.CUE}",
    " It's 357, of course; I'll say: 2024-01-02.",
    "a  b\t c\n\n d   \n",
    "Größe, naïve café, 東京, привет, 😀",
    "def f(x):\n    return x ** 2  # {'a': [1]}\n",
)
ROWS, LONGEST = 100, 4000
"""Rows of the data that are compared, and characters of each text."""
PLAIN = "PreTrainedTokenizerFast"
"""The class of transformers that takes tokenizer.json as it is."""


def texts(source: str) -> list[str]:
    """Texts to compare: SAMPLES, and prompts and replies of the source's first rows."""
    rows: list[formats.Row] = []
    if source != "demo":
        with contextlib.suppress(DataError, OSError):
            rows = list(itertools.islice(formats.iterate(source, "rlhf", Counter(), True), ROWS))
    return [*SAMPLES, *(text[:LONGEST] for row in rows for text in (row.prompt, *row.responses))]


def differing(folder: Path, samples: Iterable[str], plain: bool) -> str:
    """How transformers reads the folder differently from ``Tokenizer``, as a clause; "" where both
    give the same ids.

    ``plain``: compare the class that takes tokenizer.json as it is (the evaluation's), else
    AutoTokenizer, which follows the files' tokenizer_class. No code of the folder is run.
    """
    import transformers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = Tokenizer(folder)
    try:
        tokenizer_class = PreTrainedTokenizerFast if plain else AutoTokenizer
        reference = tokenizer_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        for text in samples:
            ids, reference_ids = tokenizer.encode(text), reference(text, add_special_tokens=False)["input_ids"]
            if ids != reference_ids:
                return (
                    f"gives other ids by {type(reference).__name__} for {shown(repr(text), 60)}: "
                    f"{_around(reference_ids, ids)}, tokenizer.json says {_around(ids, reference_ids)}"
                )
        begun = reference("a")["input_ids"]
        if begun[: len(tokenizer.bos) + 1] != tokenizer.bos + tokenizer.encode("a")[:1]:
            return (
                f"begins a text with {begun[:2]} by {type(reference).__name__}, with "
                f"{tokenizer.bos + tokenizer.encode('a')[:1]} by tokenizer.json's post_processor: add_bos_token of "
                "tokenizer_config.json says otherwise"
            )
        for name, number in (("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
            other = getattr(reference, f"{name}_token_id")
            if other != number and name in tokenizer.special_tokens.texts:
                return f"has the {name} token {other} by {type(reference).__name__}, {number} by its files"
    except (KeyboardInterrupt, SystemExit, ConfigError):
        raise
    except BaseException as error:  # of any kind, panics of tokenizers too
        message = " ".join(str(error).split()) or "no message"
        version = transformers.__version__
        return f"can't be loaded by transformers {version} ({type(error).__name__}: {shown(message, 200)})"
    return ""


def check(folder: Path, rows: int, source: str) -> list[str]:
    """Notes for the user. Raises ConfigError where a later stage would fail or train on other
    tokens."""
    samples = texts(source)
    notes = check_files(Tokenizer(folder), folder, rows, samples)
    if problem := _unread(folder):
        raise ConfigError(
            f"model.checkpoint: {folder}/{problem}; the evaluation loads it, and what is exported: "
            "correct the file, or download it again"
        )
    if problem := differing(folder, samples, plain=True):
        raise ConfigError(
            f"model.checkpoint: the tokenizer of {folder} {problem}; the evaluation would use that: save "
            "it again with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if problem := differing(folder, samples, plain=False):
        notes.append(
            f"{folder}: AutoTokenizer {problem}; training and evaluation go by tokenizer.json, and the export "
            f"will name the class {PLAIN}, so that AutoTokenizer does, too"
        )
    return notes


def _unread(folder: Path) -> str:
    """Which of the two configurations transformers can't load, and why; "" where it loads both."""
    from transformers import AutoConfig, GenerationConfig

    for name, kind in (("config.json", AutoConfig), ("generation_config.json", GenerationConfig)):
        if (folder / name).is_file():
            try:
                kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # a KeyError, a TypeError, a validation of its own
                message = " ".join(str(error).split()) or "no message"
                return f"{name} can't be loaded by transformers ({type(error).__name__}: {shown(message, 300)})"
    return ""


def check_files(tokenizer: Tokenizer, folder: Path, rows: int, samples: list[str]) -> list[str]:
    """``check`` without transformers."""
    token, number = tokenizer.highest()
    if number < 0:
        raise ConfigError(
            f"model.checkpoint: {tokenizer.file} has no vocabulary; download it again, or save the fast "
            "tokenizer there with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    if number >= rows:
        raise ConfigError(
            f"model.checkpoint: token {shown(repr(token))} of {tokenizer.file} has id {number}, the "
            f"embedding has {rows} rows (vocab_size); the tokenizer is another model's, or the "
            "embedding was not resized after tokens were added"
        )
    return [*tokenizer.special_tokens.notes(tokenizer.eos_id), *_joins(tokenizer, samples), *_foreign_code(folder)]


def _joins(tokenizer: Tokenizer, samples: list[str]) -> list[str]:
    """A note where a prompt's and a reply's tokens, joined, do not give their text. Training
    tokenises them separately."""
    prompt, reply = samples[2:4]
    text = tokenizer.decode(tokenizer.encode(prompt) + tokenizer.encode_replies([reply])[0])
    if text.strip() == (prompt + reply).strip():
        return []
    return [
        f"{tokenizer.file}: a prompt and its reply, tokenised apart as training does, read {shown(repr(text), 160)}; "
        f"expected {shown(repr(prompt + reply), 160)}: does the tokenizer change white space or letters?"
    ]


def _foreign_code(folder: Path) -> list[str]:
    names = [
        name
        for name in ("config.json", "tokenizer_config.json")
        if (hf_folder.json_object(folder, name) or {}).get("auto_map")
    ]
    return [
        f"{folder / name}: auto_map names code of the model's own; it is not run (trust_remote_code is always "
        "off), and the export leaves it out"
        for name in names
    ]


def _around(ids: list[int], others: list[int]) -> list[int]:
    """The ids from where they differ, four of them."""
    differing_at = (at for at, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    first = next(differing_at, min(len(ids), len(others)))
    return ids[first : first + 4]


def main(arguments: list[str]) -> int:
    ended = usage(arguments, "training.data.trial", "FOLDER ROWS SOURCE", __doc__)
    if ended is not None:
        return ended
    folder, rows, source = arguments
    try:
        notes = check(Path(folder), int(rows), source)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return os.EX_DATAERR
    print(json.dumps(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
