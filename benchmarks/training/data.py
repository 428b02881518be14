"""What data costs: rows that stay on disk, packing, and a step that does not wait for its batch.

    python benchmarks/training/data.py
        10 million generated rows, about 25 minutes, 8 GB in build/data-benchmark (deleted)
    python benchmarks/training/data.py --rows 2000 --peer 500
        a look, in seconds
    python benchmarks/training/data.py --hh FILE --tokenizer FOLDER ...
        packing of real lengths: Anthropic's harmless-base.test.jsonl.gz

Every part runs in a process of its own. Its peak is the kernel's (VmHWM) and includes mapped pages
of files; "anonymous" is memory that no other process shares and no file backs. The first peer
parses and tokenises every row into Python's lists, with a list as the epoch's order. The second is
Hugging Face's ``datasets``, where it can be imported (PYTHONPATH).
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

SENTENCE = "how can a red fox jump over the lazy brown dog and why did it run my"
VOCABULARY = SENTENCE.split()
BATCH, LENGTH, BATCHES = 64, 2048, 200
LAYOUTS = ((64, 1, 8, 1), (64, 1, 1, 1), (64, 1, 8, 2), (128, 2, 8, 1), (512, 8, 8, 1), (64, 8, 8, 1))
"""(global batch, data-parallel ranks, micro-batch, pipeline stages)."""


def generate(folder: Path, rows: int) -> None:
    """Write comparisons in HH's form. Lengths are as uneven as HH's, and a tenth of them; one row
    in twenty repeats the row before."""
    rng, line = random.Random(0), ""
    with open(folder / "source.jsonl", "w", encoding="utf-8") as file:
        for number in range(rows):
            if not line or rng.random() > 0.05:
                question = " ".join(rng.choices(VOCABULARY, k=int(rng.lognormvariate(1.2, 0.7)) + 1))
                prompt = f"\n\nHuman: {number} {question}?\n\nAssistant:"
                chosen, rejected = (
                    f" {' '.join(rng.choices(VOCABULARY, k=int(rng.lognormvariate(1, 0.7)) + 1))} {end}."
                    for end in "ab"
                )
                line = json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}) + "\n"
            file.write(line)


def measured(part: str, folder: Path, *arguments: str) -> dict:
    """Run a part of this script in its own process; the JSON that it printed, with "seconds",
    "peak_mb" and "anonymous_mb"."""
    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory() -> dict:
    """Memory of this process."""
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
    """The work of each rank of a trainer: map the rows, draw global batches from all over the
    epoch, lay them out."""
    tokenizer = Tokenizer(folder / "model")
    began = time.monotonic()
    rows = TokenRows(cached(folder / "data/sft.jsonl", "sft", tokenizer))
    opened = time.monotonic() - began
    sampler, tokens = Sampler(len(rows), BATCH, 0), 0
    began = time.monotonic()
    for _ in range(BATCHES):
        tokens += len(lay_out_batch(rows, tokenizer, sampler.next_batch())[0][0]["tokens"])
    return {
        "rows": len(rows),
        "open_s": round(opened, 2),
        "batch_ms": round((time.monotonic() - began) * 1e3 / BATCHES, 2),
    }


def part_list(folder: Path, rows: int) -> dict:
    """The peer: parse and tokenise into lists, shuffle a list of indices."""
    tokenizer, tokenised = Tokenizer(folder / "model"), []
    for row in formats.iterate(folder / "data/sft.jsonl", "sft", Counter()):
        tokenised += TextTokenizer(tokenizer).tokenise([row], "sft")
        if len(tokenised) == rows:
            break
    order = list(range(len(tokenised)))
    random.Random(0).shuffle(order)
    return {"rows": len(tokenised)}


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


def lay_out_batch(rows, tokenizer, indices: list[int]):
    """([micro-batch], {"tokens": count}) of the rows at ``indices``."""
    examples = [sft_example(rows[index], LENGTH) for index in indices]
    lengths = [len(example.tokens) for example in examples]
    layout = lay_out(lengths, RowLimits(LENGTH, 128, 1, 8))
    packed = [[examples[at] for at in row] for row in layout.rows]
    return [collate_packed(packed, tokenizer.pad_id, layout.length)], {"tokens": sum(lengths)}


def part_hidden(folder: Path, step_ms: float) -> dict:
    """How long a step of ``step_ms`` waits for its batch, with and without the thread that prepares
    it. Like a step on a GPU, it does not use Python meanwhile."""
    tokenizer = Tokenizer(folder / "model")
    rows = TokenRows(cached(folder / "data/sft.jsonl", "sft", tokenizer))
    waits = {}
    for name in ("alone", "ahead"):
        sampler = Sampler(len(rows), BATCH, 0)
        batches = (
            prefetched(sampler, lambda at: lay_out_batch(rows, tokenizer, at), 50)
            if name == "ahead"
            else (lay_out_batch(rows, tokenizer, sampler.next_batch()) for _ in range(50))
        )
        wait_s = []
        for _ in range(50):
            began = time.monotonic()
            next(batches)
            wait_s.append(time.monotonic() - began)
            time.sleep(step_ms / 1e3)
        waits[f"{name}_ms"] = round(sum(wait_s[1:]) * 1e3 / 49, 2)
    return waits


def hh_lengths(path: str, tokenizer: str) -> list[int]:
    """Tokens of prompt, better reply and EOS of every usable row."""
    rows = TextTokenizer(Tokenizer(tokenizer)).tokenise(list(formats.iterate(path, "sft", Counter())), "sft")
    return [min(LENGTH, len(row.prompt) + len(row.replies[0])) for row in rows]


def efficiencies(lengths: list[int], batches: int = 200) -> list[tuple]:
    """For each of LAYOUTS the share of real tokens: (layout, of one pack a micro-batch, of our
    layout, the most that rows x length can have). 128 is a GPU's multiple."""
    shares = []
    for batch, ranks, size, pipeline in LAYOUTS:
        rng, real, simple, laid_out, best = random.Random(0), 0, 0, 0, 0
        for _ in range(batches):
            drawn = [rng.choice(lengths) for _ in range(batch)]
            tokens = sum(drawn)
            real += tokens
            rows = pack(drawn, LENGTH, ranks * size)
            simple += len(rows) * padded_length([sum(drawn[at] for at in row) for row in rows], 128)
            layout = lay_out(drawn, RowLimits(LENGTH, 128, ranks, size, pipeline))
            laid_out += len(layout.rows) * layout.length
            fewest = -(-tokens // (LENGTH * ranks)) * ranks
            best += min(
                count * padded_length([max(drawn), -(-tokens // count)], 128)
                for count in range(fewest, 4 * fewest, ranks)
            )
        shares.append(((batch, ranks, size, pipeline), real / simple, real / laid_out, real / best))
    return shares


def unpacked(lengths: list[int], batches: int = 50) -> float:
    """The share of real tokens where each row is one document."""
    rng = random.Random(0)
    drawn = [[rng.choice(lengths) for _ in range(BATCH)] for _ in range(batches)]
    return sum(map(sum, drawn)) / sum(BATCH * padded_length(batch, 128) for batch in drawn)


def demo_model(folder: Path) -> None:
    from training.config.data import ModelConfig
    from training.data import demo_model

    folder.mkdir(parents=True)
    rng = random.Random(1)
    texts = [" " + " ".join(rng.choices(VOCABULARY, k=9)) + f" {number}" for number in range(5000)]
    demo_model.write(folder, texts, ModelConfig(demo_layers=1, demo_hidden=8, demo_heads=1, demo_vocab=380), 0)


def report(options, folder: Path) -> dict:
    """Run all parts, and print each result when it is known; name -> result."""
    results = {}

    def add(name: str, value) -> None:
        results[name] = value
        print(f"{name:<10} {value}", flush=True)

    demo_model(folder / "model")
    generate(folder, options.rows)
    add("source", {"rows": options.rows, "gb": round((folder / "source.jsonl").stat().st_size / 1e9, 2)})
    add("prepare", measured("prepare", folder))
    add("read", measured("read", folder))
    add("hidden", measured("hidden", folder, "--step-ms", "60"))
    add("list", measured("list", folder, "--peer", str(options.peer)))
    if importlib.util.find_spec("datasets"):
        add("datasets", measured("datasets", folder, "--peer", str(options.peer)))
    rng = random.Random(0)
    lengths = (
        hh_lengths(options.hh, options.tokenizer)
        if options.hh
        else [int(rng.lognormvariate(4.82, 0.7)) + 1 for _ in range(2000)]
    )
    add(
        "lengths",
        {
            "mean": round(sum(lengths) / len(lengths)),
            "median": sorted(lengths)[len(lengths) // 2],
            "longest": max(lengths),
        },
    )
    add("unpacked", round(unpacked(lengths), 3))
    for layout, *numbers in efficiencies(lengths, 200 if options.rows > 10_000 else 5):
        add("batch {}, DP {}, micro {}, PP {}".format(*layout), [round(number, 4) for number in numbers])
    return results


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
