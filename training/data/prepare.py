"""``python -m training.data.prepare config.json``: from one source of data to every file that the stages train on.

From comparisons come the better replies (SFT), the comparisons themselves (reward), the prompts (RLHF), and held-out prompts that
no stage trains on. Runs on the login node before anything is queued. The same input and seed give the same bytes. Exit status:
64 for a bad configuration, 65 for bad data, with one line on stderr.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from training.config import DataConfig, PrepareConfig
from training.data import demo, dialogue, formats
from training.settings import ConfigError, load

EXIT_USAGE = 64
TOKENIZER_ROWS = 20_000
"""Most SFT rows that the demo's tokenizer is trained on."""
Files = dict[str, list[dict]]


def split_prompts(prompts: Iterable[str], data: DataConfig) -> set[str]:
    """The held-out ones: ``data.heldout`` of the distinct prompts, at least 1, at most ``heldout_max``, in an order drawn by the seed
    from each prompt's own text, so that other rows of a source don't change it. Raises DataError for fewer than 2 prompts."""
    distinct = {_key(prompt) for prompt in prompts}
    if len(distinct) < 2:
        raise formats.DataError(f"{data.source}: {len(distinct)} distinct prompts; expected at least 2: one to train on, one to hold out")
    number = min(max(1, round(data.heldout * len(distinct))), max(1, data.heldout_max))
    return set(sorted(distinct, key=lambda key: hashlib.sha256(f"{data.seed}\0{key}".encode()).digest())[:number])


def _key(prompt: str) -> str:
    """What makes two prompts the same one: the words, whatever their case and spacing."""
    return " ".join(prompt.lower().split())


def from_demo(data: DataConfig) -> tuple[Files, dict]:
    """Files and counts of the generated data."""
    prompts = [question.prompt for question in demo.questions()]
    heldout = split_prompts(prompts, data)
    return demo.rows({prompt for prompt in prompts if _key(prompt) in heldout}, data.seed), {"prompts": len(prompts)}


def from_comparisons(data: DataConfig) -> tuple[Files, dict]:
    """Files and counts from a file of comparisons. Raises DataError where it holds none, or rows of another kind."""
    counts: Counter = Counter()
    rows = list(formats.iterate(data.source, "reward", counts, data.skip_bad_rows))
    for row in rows:
        counts.update(f"kept: {oddity}" for oddity in dialogue.oddities(row.prompt))
    if not rows:
        raise formats.DataError(f"{data.source}: no usable row{formats.because(counts)}")
    heldout = split_prompts((row.prompt for row in rows), data)
    parts = {"": [row for row in rows if _key(row.prompt) not in heldout],
             "_heldout": [row for row in rows if _key(row.prompt) in heldout]}
    files = {f"{stage}{part}.jsonl": _distinct(stage, chosen, counts)
             for stage in ("sft", "reward") for part, chosen in parts.items()}
    files["rlhf.jsonl"] = _distinct("rlhf", parts[""], counts)
    files["heldout.jsonl"] = _distinct("rlhf", parts["_heldout"], Counter())
    return files, dict(counts)


def _distinct(stage: str, rows: list[formats.Row], counts: Counter) -> list[dict]:
    """``rows`` in ``stage``'s format without repetitions, which are counted."""
    seen: dict[str, dict] = {}
    for row in rows:
        native = formats.as_native(row, stage)
        seen.setdefault(json.dumps(native), native)
    if len(seen) < len(rows):
        counts[f"repeated: {stage}"] += len(rows) - len(seen)
    return list(seen.values())


def write_rows(folder: Path, files: Files, counts: dict) -> None:
    """Every file is written aside and renamed; counts.json comes last and says how many rows each has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        _replace(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _replace(folder / "counts.json", json.dumps(counts, indent=2, ensure_ascii=False) + "\n")


def write_demo_model(config: PrepareConfig, sft_rows: list[dict]) -> None:
    """The demo's Hugging Face folder, with a tokenizer trained on the SFT rows; complete, or not there."""
    from training.data import demo_model  # needs torch and transformers, which other models' preparation does without

    folder = Path(config.paths.model)
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    texts = (row["prompt"] + row["response"] for row in itertools.islice(sft_rows, TOKENIZER_ROWS))
    demo_model.write(aside, texts, config.model, config.data.seed)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(aside, folder)


def prepare(config: PrepareConfig) -> dict:
    """Write everything; returns the counts: {"source", "read": {...}, "files": {name: rows}}."""
    files, read = (from_demo if config.data.source == "demo" else from_comparisons)(config.data)
    counts = {"source": config.data.source, "read": read, "files": {name: len(rows) for name, rows in files.items()}}
    if config.model.checkpoint == "demo":
        write_demo_model(config, files["sft.jsonl"])
    write_rows(Path(config.paths.output), files, counts)
    return counts


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.writing")
    with open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _report(counts: dict) -> str:
    lines = [f"data: {counts['source']}"]
    lines += [f"{number:>9,}  {name}" for name, number in counts["read"].items()]
    lines += [f"{number:>9,}  -> {name}" for name, number in counts["files"].items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m training.data.prepare config.json", file=sys.stderr)
        return EXIT_USAGE
    try:
        print(_report(prepare(load(PrepareConfig, arguments[0]))))
    except formats.DataError as error:
        print(error, file=sys.stderr)
        return formats.EXIT_DATA
    except (ConfigError, FileNotFoundError, json.JSONDecodeError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
