"""The cache of token ids: the rows themselves, made once, whole or not there, made again when what
it came from has changed."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.training import data as benchmark
from tests.support.distributed import run
from training.data import cache
from training.data.cache import TokenRows, cached
from training.data.tokenizer import Tokenizer
from training.distributed import groups
from training.errors import DataError

ROWS = [
    {
        "query": f"Why {n}?",
        "response": [f" So {n}." * (k + 1) for k in range(2 + n % 3)],
        "score": [k + n / 3 for k in range(2 + n % 3)],
    }
    for n in range(50)
]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def tokenizer(demo_run) -> Tokenizer:
    return Tokenizer(demo_run / "model")


def written(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_rows_are_what_the_tokenizer_says_of_the_text(tmp_path, tokenizer, monkeypatch, at_once):
    monkeypatch.setattr(cache, "ROWS_AT_ONCE", at_once)
    file = written(tmp_path, ROWS)
    for stage in ("sft", "reward", "rlhf"):
        rows = TokenRows(cached(file, stage, tokenizer))
        assert len(rows) == len(ROWS) and rows.most_replies == {"sft": 1, "reward": 4, "rlhf": 0}[stage]
        for row, text in zip(rows, ROWS, strict=True):
            replies = {"sft": text["response"][-1:], "reward": text["response"], "rlhf": []}[stage]
            assert row == (
                tokenizer.encode(text["query"]),
                [[*tokenizer.encode(reply), tokenizer.eos_id] for reply in replies],
                text["score"] if stage == "reward" else [],
                0,
                [],
            )
        lengths = [len(row.prompt) + max((len(reply) for reply in row.replies), default=0) for row in rows]
        for tokens in (0, min(lengths), sorted(lengths)[25], max(lengths)):
            assert rows.longer_than(tokens) == sum(length > tokens for length in lengths)
        assert pickle.loads(pickle.dumps(rows))[49] == rows[49]
        for index in (-1, 50):
            with pytest.raises(IndexError, match=f"row {index} of 50"):
                rows[index]


def test_a_large_vocabulary_gets_wide_ids(tmp_path, tokenizer):
    class Wide:
        file, ids, bos, eos_id, stop_ids = tokenizer.file, 250_680, [250_678], 2, (2,)

        def encode(self, text):
            return [0]

        def encode_prompts(self, texts):
            return [[250_678, number] for number, _ in enumerate(texts)]

        def encode_replies(self, texts):
            return [[250_679, number] for number, _ in enumerate(texts)]

    rows = TokenRows(cached(written(tmp_path, ROWS[:1]), "sft", Wide()))
    assert rows[0] == ([250_678, 0], [[250_679, 0, 2]], [], 1, []) and rows.about["types"]["ids"] == "<u4"


def test_it_is_made_once_and_made_anew_when_source_or_tokenizer_change(tmp_path, tokenizer, demo_run):
    file = written(tmp_path, ROWS)
    first = cached(file, "sft", tokenizer)
    made = (first / "about.json").stat().st_mtime_ns
    file.touch()
    assert cached(file, "sft", tokenizer) == first and (first / "about.json").stat().st_mtime_ns == made
    file.write_text(file.read_text().replace("Why 0", "Why 9"))  # as long as before
    second = cached(file, "sft", tokenizer)
    assert second != first and not first.exists()
    assert TokenRows(second)[0].prompt == tokenizer.encode("Why 9?")
    shutil.copytree(demo_run / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model/tokenizer.json").read_text())
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}))
    assert cached(file, "sft", Tokenizer(tmp_path / "model")) != second


def test_a_cache_that_lost_bytes_is_made_anew(tmp_path, tokenizer):
    file = written(tmp_path, ROWS)
    folder = cached(file, "reward", tokenizer)
    whole = {name: (folder / name).read_bytes() for name in cache.ARRAYS}
    os.truncate(folder / "ids", 10)
    assert cached(file, "reward", tokenizer) == folder
    assert {name: (folder / name).read_bytes() for name in cache.ARRAYS} == whole
    for damaged in ("", "{", "[1]", '{"bytes": 5}', '{"bytes": {}}'):
        (folder / "about.json").write_text(damaged)
        assert len(TokenRows(cached(file, "reward", tokenizer))) == 50


def test_a_bad_row_leaves_nothing(tmp_path, tokenizer):
    file = written(tmp_path, [*ROWS, {"query": 5}])
    with pytest.raises(DataError, match="rows.jsonl:51: query: 5: expected a string"):
        cached(file, "rlhf", tokenizer)
    assert [path.name for path in (tmp_path / "rows.jsonl.tokens").iterdir()] == [".lock"]


def _slowly(file: Path, tokenizer: Tokenizer, log: Path, seconds: float) -> None:
    """Makes the cache with a pause between writing and renaming; every process that writes says
    so."""
    write = cache._write

    def slow(*args):
        write(*args)
        with open(log, "a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(seconds)

    cache._write = slow
    cached(file, "sft", tokenizer)


def test_of_many_processes_one_makes_it(tmp_path, tokenizer):
    file, log = written(tmp_path, ROWS), tmp_path / "log"
    processes = [FORK.Process(target=_slowly, args=(file, tokenizer, log, 0.1)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 1
    assert len([path for path in (tmp_path / "rows.jsonl.tokens").iterdir() if path.is_dir()]) == 1


def test_a_kill_while_it_is_written_leaves_nothing_that_counts(tmp_path, tokenizer):
    file, log = written(tmp_path, ROWS), tmp_path / "log"
    process = FORK.Process(target=_slowly, args=(file, tokenizer, log, 60))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = [path for path in (tmp_path / "rows.jsonl.tokens").iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].name.startswith(".writing-")
    assert len(TokenRows(cached(file, "sft", tokenizer))) == 50
    assert not left[0].exists()


def _ranks_read(file: Path, folder: Path) -> tuple:
    tokenizer, made = Tokenizer(folder), []

    def make() -> Path:
        made.append(os.getpid())
        time.sleep(0.05)
        return cached(file, "sft", tokenizer)

    rows = TokenRows(groups.on_first(make))
    with pytest.raises(DataError, match="absent.jsonl: can't be read"):
        groups.on_first(lambda: cached(file.with_name("absent.jsonl"), "sft", tokenizer))
    return len(made), rows[7], isinstance(rows._ids.base, np.memmap) or rows._ids.base is not None


def test_the_first_rank_makes_it_for_all_and_its_errors_are_everyones(tmp_path, demo_run, monkeypatch):
    monkeypatch.setattr(groups, "HEARTBEAT", 0.01)  # the others hear several times that it goes on
    found = run(_ranks_read, 1, 1, 3, written(tmp_path, ROWS), demo_run / "model")
    assert [made for made, *_ in found] == [1, 0, 0]
    assert found[0][1] == found[1][1] == found[2][1] and all(mapped for *_, mapped in found)


def test_the_benchmark_runs(tmp_path):
    """benchmarks/training/data.py's parts on 400 rows: its numbers are of the rows that it says."""
    benchmark.demo_model(tmp_path / "model")
    benchmark.generate(tmp_path, 400)
    files = benchmark.part_prepare(tmp_path)
    assert 350 < sum(files[name] for name in ("sft.jsonl", "sft_heldout.jsonl")) < 400, (
        "one row in twenty is written twice"
    )
    assert (
        benchmark.part_read(tmp_path)["rows"] == files["sft.jsonl"] and benchmark.part_list(tmp_path, 50)["rows"] == 50
    )
    assert benchmark.part_hidden(tmp_path, 1).keys() == {"alone_ms", "ahead_ms"}
    for _, before, now, most in benchmark.efficiencies([100, 300, 500], 2):
        assert 0 < before <= 1 and before - 0.02 < now <= most + 1e-9
    assert benchmark.memory()["peak_mb"] >= benchmark.memory()["anonymous_mb"] > 0


@pytest.mark.parametrize("umask, mode", [(0o077, 0o700), (0o022, 0o755), (0o002, 0o775)])
def test_a_cache_is_open_to_others_as_the_umask_says(tmp_path, tokenizer, umask, mode):
    before = os.umask(umask)
    try:
        folder = Path(cached(written(tmp_path, ROWS), "sft", tokenizer))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {mode}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode & 0o666}
