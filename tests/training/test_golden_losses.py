"""Twenty steps of each trainer on a tiny model against the numbers in golden/: a refactor that
changes all layouts alike is seen here.

``CONVOY_GOLDEN=exact`` compares every digit, on the kind of CPU that wrote the files; without it
another CPU's rounding passes. Metrics that came later than the files are not compared.
``CONVOY_GOLDEN=write`` rewrites the files: say in the commit why the numbers changed.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tests.support.distributed import run
from training import dpo, grpo, ppo, reward, sft

GOLDEN = Path(__file__).parent / "golden"
MODE = os.environ.get("CONVOY_GOLDEN", "")
STEPS = 20
TRAINERS = {"sft": sft.run, "reward": reward.run, "dpo": dpo.run, "ppo": ppo.run, "grpo": grpo.run}
MEASURED = ("seconds", "per_second", "memory", "_gb", "time", "mfu", "wait", "utilization", "tail_share")
"""Parts of the names of metrics that no two runs have in common."""


def numbers(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what a clock or the device says."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in sorted(row.items()) if not any(part in name for part in MEASURED)}
        for row in rows
    ]


@pytest.mark.parametrize("stage", TRAINERS)
@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_twenty_steps_give_the_golden_numbers(family, stage, family_run, tmp_path):
    prepared = family_run(family)
    config = getattr(prepared, stage)(tmp_path / stage, iterations=STEPS, eval_every=10)
    run(TRAINERS[stage], 1, 1, 1, config)
    rows = numbers(tmp_path / stage)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = GOLDEN / f"{family}_{stage}.jsonl"
    if MODE == "write":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    golden = path.read_text()
    for row, expected in zip(rows, map(json.loads, golden.splitlines()), strict=True):
        for name, value in expected.items():
            assert same(row[name], value), (row["iteration"], name, row[name], value)


def same(value: float | None, golden: float | None) -> bool:
    """Metrics hold None where a number is not finite."""
    if MODE == "exact" or value is None or golden is None:
        return value == golden
    return math.isclose(value, golden, rel_tol=1e-4, abs_tol=1e-6)
