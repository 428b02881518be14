"""``python -m training.data.prepare config.json``: from one source of data to every file that the
stages train on.

Comparisons give the better replies (SFT), the comparisons themselves (reward), the prompts (RLHF),
and held-out prompts that no stage trains on. Rows with one reply, such as chat messages, give the
same without comparisons. The program runs on the login node before anything is queued. The same
input and seed give the same bytes. Exit status: 64 for a bad configuration, 65 for bad data, with
one line on stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from training.checkpoint import checksums
from training.config.data import DataConfig, PrepareConfig
from training.config.schema import load, usage
from training.data.cache import cached
from training.data.rows import HH_TEXT
from training.data.sorting import STAGES, TOKENIZER_ROWS, Writer, from_demo, from_source, names
from training.data.source import lines
from training.data.template import of_checkpoint
from training.data.tokenised import RowTokenizer
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError, DataError

EXIT_USAGE = 64
WEIGHTS = (".safetensors", ".bin")


def write_demo_model(config: PrepareConfig, sft_rows: Iterable[dict]) -> None:
    """Write the demo's Hugging Face folder, with a tokenizer trained on the SFT rows. A kill leaves
    the complete folder or none."""
    # needs torch and transformers, which other models' preparation does without
    from training.data import demo_model

    folder = Path(config.paths.model)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    texts = (row["prompt"] + row["response"] for row in itertools.islice(sft_rows, TOKENIZER_ROWS))
    demo_model.write(temporary, texts, config.model, config.data.seed)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def prepare(config: PrepareConfig) -> dict:
    """Write all files and their token caches -> counts: {"source", "read": {...}, "files": {name:
    rows}, "inputs": {...}}. Raises ConfigError and DataError."""
    folder, own = Path(config.paths.output), config.model.checkpoint == "demo"
    with Writer(folder) as writer:
        inputs = _inputs(config)
        rows = of_checkpoint(config.data, config.model.checkpoint)
        read = _sorted(config.data, writer, rows)
        if own:
            write_demo_model(config, writer.rows("sft.jsonl"))
        tokenizer = rows.tokenizer if rows else Tokenizer(config.paths.model)
        for key, entry in inputs.items():
            # it is read twice, and its sha256 is to be what was read
            if checksums.touched(entry["path"]) != entry["touched"]:
                raise DataError(f"{key} = {entry['path']!r} was written while it was read; wait until it is complete")
        counts = {
            "source": config.data.source,
            "template": rows.name if rows else "hh",
            "read": read,
            "files": dict(writer.counts),
            "inputs": inputs,
        }
        writer.publish(counts)
    for stage in STAGES:  # here, and not by the stage: its GPUs would wait for it
        for name in names(stage):
            if counts["files"][name]:
                cached(folder / name, stage, tokenizer)
    return counts


def _sorted(data: DataConfig, writer: Writer, rows: RowTokenizer | None) -> dict[str, int]:
    """Write the stages' files -> counts of the source. ``rows`` None: the demo's model, whose
    tokenizer is trained on them."""
    if data.source == "demo":
        return from_demo(data, writer, rows.style() if rows else HH_TEXT)
    return from_source(data, writer, rows.style(), rows.problems) if rows else from_source(data, writer)


def _inputs(config: PrepareConfig) -> dict[str, dict]:
    """Inputs of the run: key (of rows) or name (of the model's files) -> path and the mark that
    identifies its content."""
    paths = {}
    if config.data.source != "demo":
        paths["data.source"] = config.data.source
        next(lines(config.data.source), None)  # a file, of lines of JSON
    if config.model.checkpoint != "demo":
        paths["model.checkpoint"] = str(Path(config.model.checkpoint, "tokenizer.json"))
    try:
        inputs = {key: {"path": path, **checksums.mark(path)} for key, path in paths.items()}
        for path in sorted(Path(config.model.checkpoint).glob("*")) if config.model.checkpoint != "demo" else ():
            if (path.suffix in WEIGHTS or path.name == "config.json") and path.is_file():
                inputs[f"{path.name} of model.checkpoint"] = {"path": str(path), **checksums.mark(path, weights=True)}
        return inputs
    except OSError as error:
        raise DataError(f"{error.filename}: can't be read: {error.strerror}") from None


def _report(counts: dict) -> str:
    lines = [f"data: {counts['source']}, template {counts['template']}"]
    lines += [f"{number:>9,}  {name}" for name, number in counts["read"].items()]
    lines += [f"{number:>9,}  -> {name}" for name, number in counts["files"].items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    ended = usage(arguments, "training.data.prepare", "config.json", __doc__)
    if ended is not None:
        return ended
    try:
        print(_report(prepare(load(PrepareConfig, arguments[0]))))
    except DataError as error:
        print(error, file=sys.stderr)
        return DataError.exit_code
    except (ConfigError, FileNotFoundError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
