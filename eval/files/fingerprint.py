"""What a folder holds, as one hash: what was made with other content is not reused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval.errors import DataError

SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".gguf",
    ".json",
    ".model",
    ".jinja",
    ".txt",
    ".tiktoken",
    ".spm",
    ".vocab",
    ".msgpack",
    ".h5",
)
"""Of files that a model, its tokenizer or its chat template is read from."""
NOT_READ = (
    "conversion.json",
    "DONE.json",
    "trainer_state.json",
    "training_args.bin",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "README.txt",
    "LICENSE.txt",
)
"""Files beside a model that say when and how it was made; transformers doesn't load them."""
FOLDERS = ("additional_chat_templates",)
_BLOCK = 1 << 24


def of_model(folder: str | Path) -> str:
    """16 hex digits of the sha256 of all that the model depends on: weights, configuration,
    tokenizer, chat template."""
    return _of_files(Path(folder), _model_files(Path(folder)))


def of_folder(folder: str | Path) -> str:
    """16 hex digits of the sha256 of all files below ``folder``, hidden ones and Python's caches
    left out."""
    folder = Path(folder)
    return _of_files(
        folder,
        (
            path
            for path in folder.rglob("*")
            if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)
        ),
    )


def _model_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix in SUFFIXES and path.name not in NOT_READ:
            yield path
        elif path.name in FOLDERS and path.is_dir():
            yield from path.glob("*.jinja")


def _of_files(folder: Path, paths: Iterator[Path]) -> str:
    """Raises DataError for a file that can't be read."""
    try:
        files = sorted((str(path.relative_to(folder)), path) for path in paths if path.is_file())
        with ThreadPoolExecutor() as pool:
            hashes = list(pool.map(_of_file, (path for _, path in files)))
    except OSError as error:
        raise DataError(f"{folder}: {error.filename or 'a file'} can't be read: {error.strerror}") from None
    digest = hashlib.sha256()
    for (name, _), content in zip(files, hashes, strict=True):
        digest.update(f"{name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
