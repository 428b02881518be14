"""Cache of rows as token ids on disk. One process writes it, and all ranks of a node read it
through the same pages of memory.

``sft.jsonl.tokens/KEY/``, next to ``sft.jsonl``, holds flat arrays: ``ids`` of every piece (a
prompt, then its replies) end to end, ``pieces`` and ``rows`` (int64: where each piece's ids and
each row's pieces end), ``scores`` (float64, one a reply where there are any), ``spans`` (int64,
where each learnt turn of a chat starts and ends in its row) and ``turns`` (int64, where each row's
spans end; empty where the reply alone is learnt), and about.json. A prompt begins with its BOS, and
a reply has its end. The text is not cut, so one cache serves every length. KEY is the sha256 of the
inputs: source, tokenizer, chat template, kind of row. The folder is written under a temporary name,
fsynced and renamed, so a folder named KEY is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from training.checkpoint.checksums import digest
from training.data import formats
from training.data.template import row_tokenizer
from training.data.tokenised import RowTokenizer, Tokenised
from training.data.tokenizer import Tokenizer
from training.data.turns import BadRow
from training.errors import DataError
from training.files import atomic

FORMAT = 3
ROWS_AT_ONCE = 4096
"""Rows that are tokenised together: enough for all cores, yet little memory."""
ARRAYS = {"ids": "", "pieces": "<i8", "rows": "<i8", "scores": "<f8", "spans": "<i8", "turns": "<i8"}
"""Array -> its type. The type of ``ids`` is as wide as the vocabulary needs; about.json has it."""


class TokenRows(Sequence):
    """The rows of a cache. A row is read on access; forked and pickled readers map the same
    files."""

    def __init__(self, folder: Path):
        self.folder, self.about = folder, json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.most_replies: int = self.about["most_replies"]
        """Replies of the row with the most."""
        self.cue: int = self.about["cue"]
        """Ids of the assistant's mark that every prompt ends with, BOS included."""
        self.stop_ids: tuple[int, ...] = tuple(self.about["stop_ids"])
        """Ids that end a reply."""
        self._ids, self._pieces, self._rows, self._scores, self._spans, self._turns = (
            _mapped(folder / name, self.about["types"][name]) for name in ARRAYS
        )

    def __len__(self) -> int:
        return self.about["rows"]

    def __getitem__(self, index: int) -> Tokenised:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.folder}")
        first, last = (int(self._rows[index - 1]) if index else 0), int(self._rows[index])
        ends = self._pieces[max(first - 1, 0) : last].tolist()
        starts = ends[:-1] if first else [0, *ends[:-1]]
        ends = ends[1:] if first else ends
        prompt, *replies = (self._ids[start:end].tolist() for start, end in zip(starts, ends, strict=True))
        # Every row before has one prompt: what is left of its pieces are replies.
        scores = self._scores[first - index : last - index - 1].tolist() if len(self._scores) else []
        bos = self.about["bos"]  # what stays when a prompt's head is cut; a chat template may have none
        opening = len(bos) if prompt[: len(bos)] == bos else 0
        return Tokenised(prompt, replies, scores, opening, self._learnt(index))

    def _learnt(self, index: int) -> list[tuple[int, int]]:
        if not len(self._turns):
            return []
        first, last = (int(self._turns[index - 1]) if index else 0), int(self._turns[index])
        spans = self._spans[2 * first : 2 * last].tolist()
        return list(zip(spans[::2], spans[1::2], strict=True))

    def longer_than(self, tokens: int) -> int:
        """Number of rows with more than ``tokens`` ids, counted as by ``lengths``."""
        return len(self.longer(tokens))

    def longer(self, tokens: int) -> np.ndarray:
        """Indices of the rows with more than ``tokens`` ids, ascending."""
        indices = []
        for first in range(0, len(self), ROWS_AT_ONCE):
            ends = self._rows[first : first + ROWS_AT_ONCE]
            begin = int(self._rows[first - 1]) if first else 0
            pieces = np.diff(self._pieces[begin : int(ends[-1])], prepend=self._pieces[begin - 1] if begin else 0)
            starts = np.concatenate(([0], ends[:-1] - begin))
            lengths = pieces[starts]
            if self.about["stage"] != "rlhf":
                replies = pieces.copy()
                replies[starts] = 0  # the prompt, which is no reply
                lengths = lengths + np.maximum.reduceat(replies, starts)
            indices.append(first + (lengths > tokens).nonzero()[0])
        return np.concatenate(indices) if indices else np.empty(0, int)

    def __reduce__(self):
        return TokenRows, (self.folder,)


def _mapped(path: Path, kind: str) -> np.ndarray:
    """A read-only array over the file's pages. An empty file, which can't be mapped, gives an empty
    array."""
    return np.memmap(path, kind, "r").view(np.ndarray) if path.stat().st_size else np.empty(0, kind)


def cached(path: str | Path, stage: str, tokenizer: Tokenizer) -> Path:
    """The cache's folder for ``path``, written if it is missing.

    Of several processes one writes it and the others wait. Remains of a killed process are removed.
    Rows whose prompts are messages go through the tokenizer's chat template. Raises DataError where
    ``path`` has a bad row or none that ``stage`` can use, OSError where the cache can't be written.
    """
    source = Path(path)
    rows = row_tokenizer(source, tokenizer)
    key = _key(source, stage, rows)
    folder = source.with_name(source.name + ".tokens")
    target = folder / key[:32]
    if _complete(target):
        return target
    folder.mkdir(exist_ok=True)
    with _locked(folder) as locked:
        if _complete(target):
            return target
        for old in folder.iterdir():
            # of another source or tokenizer, or half-written
            if old.is_dir() and (locked or old.name == target.name):
                shutil.rmtree(old)
        temporary = folder / f".writing-{uuid.uuid4().hex}"
        temporary.mkdir()  # open to others as the user's umask says, which mkdtemp does not ask
        try:
            _write(source, stage, rows, temporary, key)
            with contextlib.suppress(OSError):  # without a lock another process may have been first
                os.rename(temporary, target)
            atomic.sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    if not _complete(target):
        raise OSError(
            f"{target}: written, but not there; is the file system full, or the folder written by another host?"
        )
    return target


def _key(source: Path, stage: str, rows: RowTokenizer) -> str:
    tokenizer = rows.tokenizer
    try:
        digests = [digest(source), digest(tokenizer.file)]
    except OSError as error:
        raise DataError(f"{source}: can't be read: {error}") from None
    return hashlib.sha256(
        json.dumps([FORMAT, stage, tokenizers.__version__, tokenizer.bos, *digests, rows.name, rows.digest]).encode()
    ).hexdigest()


def _complete(folder: Path) -> bool:
    """True if the cache is there with all its bytes. A renamed folder is complete, but a disk or a
    copy may have lost some."""
    try:
        sizes = json.loads((folder / "about.json").read_text(encoding="utf-8"))["bytes"]
        return set(sizes) == set(ARRAYS) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # missing or damaged
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock -> True, or False where the file system has no locks. The kernel
    releases a killed process's lock."""
    with open(folder / ".lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _write(source: Path, stage: str, row_tokenizer: RowTokenizer, temporary: Path, key: str) -> None:
    tokenizer = row_tokenizer.tokenizer
    types = {**ARRAYS, "ids": "<u2" if tokenizer.ids <= 1 << 16 else "<u4"}
    counts: Counter = Counter()
    rows = pieces = ids = spans = most_replies = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(temporary / name, "wb")) for name in ARRAYS}
        usable = formats.iterate(source, stage, counts, style=row_tokenizer.style())
        while chunk := _tokenised(source, row_tokenizer, list(itertools.islice(usable, ROWS_AT_ONCE)), stage):
            flat = [piece for row in chunk for piece in (row.prompt, *row.replies)]
            ends = ids + np.cumsum([len(piece) for piece in flat])
            last = pieces + np.cumsum([1 + len(row.replies) for row in chunk])
            np.fromiter(itertools.chain.from_iterable(flat), types["ids"]).tofile(files["ids"])
            ends.astype(types["pieces"]).tofile(files["pieces"])
            last.astype(types["rows"]).tofile(files["rows"])
            np.fromiter((score for row in chunk for score in row.scores), types["scores"]).tofile(files["scores"])
            if any(row.learnt for row in chunk):
                learnt = spans + np.cumsum([len(row.learnt) for row in chunk])
                places = (place for row in chunk for span in row.learnt for place in span)
                np.fromiter(places, types["spans"]).tofile(files["spans"])
                learnt.astype(types["turns"]).tofile(files["turns"])
                spans = int(learnt[-1])
            rows, pieces, ids = rows + len(chunk), int(last[-1]), int(ends[-1])
            most_replies = max(most_replies, *(len(row.replies) for row in chunk))
    if not rows:
        raise DataError(f"{source}: no usable row for {stage}{formats.because(counts)}")
    about = {
        "format": FORMAT,
        "key": key,
        "source": source.name,
        "stage": stage,
        "rows": rows,
        "most_replies": most_replies,
        "style": row_tokenizer.name,
        "bos": row_tokenizer.bos,
        "cue": row_tokenizer.cue,
        "stop_ids": list(row_tokenizer.stop_ids),
        "types": types,
        "bytes": {name: (temporary / name).stat().st_size for name in ARRAYS},
    }
    (temporary / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        atomic.sync(path)


def _tokenised(source: Path, rows: RowTokenizer, chunk: list, stage: str) -> list[Tokenised]:
    try:
        return rows.tokenise(chunk, stage)
    except BadRow as error:
        raise DataError(f"{source}: {error}") from None
