"""The page of metrics names every number of the golden runs."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_names_every_metric_of_the_golden_runs():
    page = (ROOT / "docs/reference/metrics.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "tests/training/golden").glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    names = {name for row in rows for name in row if not name.startswith("heldout_accuracy_at_")}
    assert files and not {name for name in names if f"`{name}`" not in page}
