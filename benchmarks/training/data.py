"""What data costs: rows that are never held in memory, packing, and a step that does not wait for
its batch.

    python benchmarks/training/data.py
        10 million generated rows, about 25 minutes, 8 GB in build/data-benchmark (deleted)
    python benchmarks/training/data.py --rows 2000 --peer 500
        a look, in seconds
    python benchmarks/training/data.py --hh FILE --tokenizer FOLDER ...
        packing of real lengths: Anthropic's harmless-base.test.jsonl.gz

Every part runs in a process of its own; its peak is the kernel's (VmHWM), mapped pages of files
included, "anonymous" is what no other process shares and no file backs. The peer is what the
trainers did before: every row parsed and tokenised into Python's lists, a list as the epoch's
order; and, where it can be imported (PYTHONPATH), Hugging Face's ``datasets``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from training.data import formats  # noqa: E402
from training.data.batches import Sampler, padded_length, sft_example  # noqa: E402
from training.data.cache import TokenRows, cached  # noqa: E402
from training.data.packing import RowLimits, collate_packed, lay_out, pack  # noqa: E402
from training.data.prefetch import prefetched  # noqa: E402
from training.data.tokenised import TextTokenizer  # noqa: E402
from training.data.tokenizer import Tokenizer  # noqa: E402

WORDS = (
    "how",
    "can",
    "a",
    "red",
    "fox",
    "jump",
    "over",
    "the",
    "lazy",
    "brown",
    "dog",
    "and",
    "why",
    "did",
    "it",
    "run",
    "my",
)
BATCH, LENGTH, BATCHES = 64, 2048, 200
LAYOUTS = ((64, 1, 8, 1), (64, 1, 1, 1), (64, 1, 8, 2), (128, 2, 8, 1), (512, 8, 8, 1), (64, 8, 8, 1))
"""(global batch, data-parallel ranks, micro-batch, pipeline stages)."""


def generate(folder: Path, rows: int) -> None:
    """Comparisons in HH's form with lengths as uneven as HH's, a tenth of them; one in twenty is
    the row before once more."""
    rng, line = random.Random(0), ""
    with open(folder / "source.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            if not line or rng.random() > 0.05:
                question = " ".join(rng.choices(WORDS, k=int(rng.lognormvariate(1.2, 0.7)) + 1))
                prompt = f"\n\nHuman: {number} {question}?\n\nAssistant:"
                chosen, rejected = (
                    f" {' '.join(rng.choices(WORDS, k=int(rng.lognormvariate(1, 0.7)) + 1))} {end}." for end in "ab"
                )
                line = json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}) + "\n"
            file.write(line)


def measured(part: str, folder: Path, *arguments: str) -> dict:
    """A part of this script in its own process -> what it printed as JSON, with "seconds",
    "peak_mb", "anonymous_mb"."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory() -> dict:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {
        f"{name}_mb": round(int(status[key].split()[0]) / 1024)
        for name, key in (("peak", "VmHWM"), ("anonymous", "RssAnon"))
    }


def part_prepare(folder: Path) -> dict:
    """Split, dedup, count, write, and tokenise for all stages."""
    from training.config.data import DataConfig, ModelConfig, PrepareConfig, PreparePaths
    from training.data.prepare import prepare

    paths = PreparePaths(str(folder / "data"), "")
    config = PrepareConfig(
        paths, ModelConfig(checkpoint=str(folder / "model")), DataConfig(source=str(folder / "source.jsonl"))
    )
    return prepare(config)["files"]


def part_read(folder: Path) -> dict:
    """What each rank of a trainer does: map the rows, draw global batches from all over the epoch,
    lay them out."""
    tokenizer = Tokenizer(folder / "model")
    began = time.monotonic()
    rows = TokenRows(cached(folder / "data/sft.jsonl", "sft", tokenizer))
    opened = time.monotonic() - began
    sampler, tokens = Sampler(len(rows), BATCH, 0), 0
    began = time.monotonic()
    for _ in range(BATCHES):
        tokens += len(make(rows, tokenizer, sampler.next_batch())[0][0]["tokens"])
    return {
        "rows": len(rows),
        "open_s": round(opened, 2),
        "batch_ms": round((time.monotonic() - began) * 1e3 / BATCHES, 2),
    }


def part_list(folder: Path, rows: int) -> dict:
    """The peer: parse and tokenise into lists, shuffle a list of indices."""
    tokenizer, held = Tokenizer(folder / "model"), []
    for row in formats.iterate(folder / "data/sft.jsonl", "sft", Counter()):
        held += TextTokenizer(tokenizer).tokenise([row], "sft")
        if len(held) == rows:
            break
    order = list(range(len(held)))
    random.Random(0).shuffle(order)
    return {"rows": len(held)}


def part_datasets(folder: Path, rows: int) -> dict:
    """The peer: Hugging Face's datasets, Arrow on disk, tokenised by map, shuffled."""
    import datasets

    tokenizer = Tokenizer(folder / "model")
    arrow = str(folder / "arrow")
    data = datasets.load_dataset(
        "json", data_files=str(folder / "data/sft.jsonl"), split=f"train[:{rows}]", cache_dir=arrow
    )
    data = data.map(
        lambda batch: {name: tokenizer.encode_all(batch[name]) for name in ("prompt", "response")}, batched=True
    )
    began, shuffled = time.monotonic(), data.shuffle(seed=0)
    for first in range(0, BATCHES * BATCH, BATCH):
        shuffled[[at % len(shuffled) for at in range(first, first + BATCH)]]
    return {"rows": len(data), "read_ms": round((time.monotonic() - began) * 1e3 / BATCHES, 2)}


def make(rows, tokenizer, indices: list[int]):
    examples = [sft_example(rows[index], LENGTH) for index in indices]
    lengths = [len(example.tokens) for example in examples]
    layout = lay_out(lengths, RowLimits(LENGTH, 128, 1, 8))
    packed = [[examples[at] for at in row] for row in layout.rows]
    return [collate_packed(packed, tokenizer.pad_id, layout.length)], {"tokens": sum(lengths)}


def part_hidden(folder: Path, step_ms: float) -> dict:
    """A step of ``step_ms`` that leaves Python alone, as one on a GPU does: how long it waits for
    its batch with and without the thread."""
    tokenizer = Tokenizer(folder / "model")
    rows = TokenRows(cached(folder / "data/sft.jsonl", "sft", tokenizer))
    waits = {}
    for name in ("alone", "ahead"):
        sampler = Sampler(len(rows), BATCH, 0)
        batches = (
            prefetched(sampler, lambda at: make(rows, tokenizer, at), 50)
            if name == "ahead"
            else (make(rows, tokenizer, sampler.next_batch()) for _ in range(50))
        )
        waited = []
        for _ in range(50):
            began = time.monotonic()
            next(batches)
            waited.append(time.monotonic() - began)
            time.sleep(step_ms / 1e3)
        waits[f"{name}_ms"] = round(sum(waited[1:]) * 1e3 / 49, 2)
    return waits


def hh_lengths(path: str, tokenizer: str) -> list[int]:
    """Tokens of prompt, better reply and EOS of every usable row."""
    made = TextTokenizer(Tokenizer(tokenizer)).tokenise(list(formats.iterate(path, "sft", Counter())), "sft")
    return [min(LENGTH, len(row.prompt) + len(row.replies[0]) + 1) for row in made]


def efficiencies(lengths: list[int], batches: int = 200) -> list[tuple]:
    """(layout, before, now, most that rows x length of these multiples allow) for each of LAYOUTS;
    128 is a GPU's multiple."""
    found = []
    for batch, ranks, size, pipeline in LAYOUTS:
        rng, held, before, now, most = random.Random(0), 0, 0, 0, 0
        for _ in range(batches):
            drawn = [rng.choice(lengths) for _ in range(batch)]
            held += sum(drawn)
            rows = pack(drawn, LENGTH, ranks * size)
            before += len(rows) * padded_length([sum(drawn[at] for at in row) for row in rows], 128)
            layout = lay_out(drawn, RowLimits(LENGTH, 128, ranks, size, pipeline))
            now += len(layout.rows) * layout.length
            fewest = -(-sum(drawn) // (LENGTH * ranks)) * ranks
            most += min(
                count * padded_length([max(drawn), -(-sum(drawn) // count)], 128)
                for count in range(fewest, 4 * fewest, ranks)
            )
        found.append(((batch, ranks, size, pipeline), held / before, held / now, held / most))
    return found


def unpacked(lengths: list[int], batches: int = 50) -> float:
    rng = random.Random(0)
    drawn = [[rng.choice(lengths) for _ in range(BATCH)] for _ in range(batches)]
    return sum(map(sum, drawn)) / sum(BATCH * padded_length(batch, 128) for batch in drawn)


def demo_model(folder: Path) -> None:
    from training.config.data import ModelConfig
    from training.data import demo_model

    folder.mkdir(parents=True)
    rng = random.Random(1)
    texts = [" " + " ".join(rng.choices(WORDS, k=9)) + f" {number}" for number in range(5000)]
    demo_model.write(folder, texts, ModelConfig(demo_layers=1, demo_hidden=8, demo_heads=1, demo_vocab=380), 0)


def report(options, folder: Path) -> dict:
    """Everything, printed as it comes."""
    found = {}

    def say(name: str, value) -> None:
        found[name] = value
        print(f"{name:<10} {value}", flush=True)

    demo_model(folder / "model")
    generate(folder, options.rows)
    say("source", {"rows": options.rows, "gb": round((folder / "source.jsonl").stat().st_size / 1e9, 2)})
    say("prepare", measured("prepare", folder))
    say("read", measured("read", folder))
    say("hidden", measured("hidden", folder, "--step-ms", "60"))
    say("list", measured("list", folder, "--peer", str(options.peer)))
    if importlib.util.find_spec("datasets"):
        say("datasets", measured("datasets", folder, "--peer", str(options.peer)))
    rng = random.Random(0)
    lengths = (
        hh_lengths(options.hh, options.tokenizer)
        if options.hh
        else [int(rng.lognormvariate(4.82, 0.7)) + 1 for _ in range(2000)]
    )
    say(
        "lengths",
        {
            "mean": round(sum(lengths) / len(lengths)),
            "median": sorted(lengths)[len(lengths) // 2],
            "longest": max(lengths),
        },
    )
    say("unpacked", round(unpacked(lengths), 3))
    for layout, *numbers in efficiencies(lengths, 200 if options.rows > 10_000 else 5):
        say("batch {}, DP {}, micro {}, PP {}".format(*layout), [round(number, 4) for number in numbers])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--peer", type=int, default=1_000_000, help="rows that the peers read")
    parser.add_argument(
        "--hh", default="", help="a real file whose lengths are packed; without it: log-normal ones like HH's"
    )
    parser.add_argument("--tokenizer", default="", help="for --hh: a folder with tokenizer.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/data-benchmark")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--step-ms", type=float, default=60, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        extra = {"list": (options.peer,), "datasets": (options.peer,), "hidden": (options.step_ms,)}.get(
            options.part, ()
        )
        began = time.monotonic()
        result = globals()[f"part_{options.part}"](options.folder, *extra)
        print(json.dumps({**result, "seconds": round(time.monotonic() - began, 2), **memory()}))
        return 0
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    try:
        report(options, options.folder)
    finally:
        shutil.rmtree(options.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
