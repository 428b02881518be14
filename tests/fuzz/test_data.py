"""Damaged data files: each is read, or refused in one line that names the file; no traceback, no
hang, no growth of memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
from collections import Counter
from dataclasses import asdict

import pytest

from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_text, peak_mb, within
from training.config.data import DataConfig, ModelConfig
from training.data import formats, peek
from training.errors import DataError

NUMBER = 3000
WHOLE_EVERY = 15
"""One in so many small files is prepared to its end, tokenised and cut."""
CUE = "\n\nAssistant:"


def rows(number: int) -> list[dict]:
    """One row of each format."""
    ask, say, no = f"Where does otter {number} live?", f"In lake {number}.", "No one knows."
    user, assistant, worse = (
        {"role": role, "content": text} for role, text in (("user", ask), ("assistant", say), ("assistant", no))
    )
    system, more = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "And in winter?"}
    return [
        {"prompt": ask, "response": say},
        {"query": ask, "response": [say, no], "score": [1, 0.5]},
        {"prompt": ask},
        {"chosen": f"\n\nHuman: {ask}{CUE} {say}", "rejected": f"\n\nHuman: {ask}{CUE} {no}"},
        {"prompt": ask, "chosen": say, "rejected": no},
        {"prompt": [user], "chosen": [assistant], "rejected": [worse]},
        {"prompt": ask, "completion": say, "label": True},
        {"messages": [system, user, assistant, more, worse]},
        {"chosen": [system, user, assistant], "rejected": [system, user, worse]},
        {"prompt": [user], "completion": [assistant, more, worse]},
    ]


def damaged_file(rng: random.Random, seed: int) -> bytes:
    """Some good rows among which one is damaged, or a file whose bytes are; one in four compressed,
    before or after."""
    good = [row for number in range(rng.randint(1, 4)) for row in rng.sample(rows(number), rng.randint(1, 6))]
    kind = rng.random()
    texts = [json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass") for row in good]
    if kind < 0.6:
        at = rng.randrange(len(texts))
        texts[at] = damaged_text(rng, good[at]) if kind < 0.3 else json.dumps(damaged_json(rng, good[at])).encode()
    content = rng.choice((b"\n", b"\n", b"\r\n", b"\n\n")).join(texts) + rng.choice((b"", b"\n"))
    if kind >= 0.6:
        content = damaged_bytes(rng, content)
    packed = rng.random()
    if packed < 0.25:
        content = gzip.compress(content, 1, mtime=0)
        content = damaged_bytes(rng, content) if packed < 0.15 else content
    return content


def settings(path, skip: bool, model: dict) -> str:
    stages = {
        "sft": ("sft", "seq_length", 24),
        "reward": ("reward", "seq_length", 24),
        "rlhf": ("rlhf", "prompt_length", 16),
    }
    return json.dumps({"data": asdict(DataConfig(str(path), skip_bad_rows=skip)), "model": model, "stages": stages})


def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, record_property):
    codes, before = Counter(), 0.0
    for seed in range(NUMBER):
        rng = random.Random(seed)
        path = tmp_path / rng.choice(("rows.jsonl", "rows.jsonl.gz", "rows"))
        path.write_bytes(damaged_file(rng, seed))
        skip, out, errors = rng.random() < 0.5, io.StringIO(), io.StringIO()
        model = {**asdict(ModelConfig()), "demo_vocab": 262} if seed % WHOLE_EVERY == 0 else {}
        arguments = [str(path), "100", settings(path, skip, model)]
        with within(10), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = peek.main(arguments)
        codes[code] += 1
        words = errors.getvalue()
        assert code in (0, 64, 65) and (code == 0) == (not words), (seed, code, words)
        assert code == 0 or words.count("\n") == 1 and (str(path) in words or "model." in words or "data." in words), (
            seed,
            words,
        )
        assert out.getvalue() or code, seed
        if seed == NUMBER // 10:
            before = peak_mb()
    record_property("ended", dict(codes))
    assert codes[0] > NUMBER / 10 and codes[65] > NUMBER / 3, codes
    assert peak_mb() - before < 100, "memory grows"


@pytest.mark.parametrize("stage", ["sft", "reward", "rlhf"])
def test_rows_that_pass_are_text_with_replies_and_scores(tmp_path, stage):
    """What is read of a damaged file has what a trainer expects."""
    read, path = 0, tmp_path / "rows.jsonl"
    for seed in range(NUMBER, NUMBER + NUMBER // 10):
        path.write_bytes(damaged_file(random.Random(seed), seed))
        with contextlib.suppress(DataError):
            for row in formats.iterate(path, stage, Counter(), True):
                assert row.prompt.strip() and all(reply.strip() for reply in row.responses)
                assert len(row.responses) == len(row.scores) >= formats.NEEDS[stage][0]
                json.dumps(row.as_native(stage), allow_nan=False).encode()
                read += 1
    assert read > 50
