"""lm-evaluation-harness: what is asked of it and what is read from it; and a real run on local
files where it is in build/harness (CONTRIBUTING.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval import harness
from eval.config import MTBenchConfig, MTBenchPaths
from eval.errors import DataError

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/harness"
TASK = """task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def settings(output: Path, models: dict, **values) -> MTBenchConfig:
    paths = MTBenchPaths(output=str(output), models=models, heldout="", stages={}, report="")
    return MTBenchConfig(paths=paths, **values)


def test_results_are_read_by_task_and_metric():
    raw = {
        "results": {
            "arc": {
                "alias": "arc",
                "acc,none": 0.25,
                "acc_stderr,none": 0.125,
                "acc_norm,none": 0.5,
                "acc_norm_stderr,none": "N/A",
                "exact_match,flexible": 1.0,
            }
        },
        "n-samples": {"arc": {"original": 9, "effective": 4}},
    }
    assert harness.read(raw) == {
        "arc": {
            "examples": 4,
            "metrics": {
                "acc": {"value": 0.25, "stderr": 0.125},
                "acc_norm": {"value": 0.5, "stderr": None},
                "exact_match (flexible)": {"value": 1.0, "stderr": None},
            },
        }
    }


def test_what_is_missing_is_said_before_the_work(tmp_path):
    harness.require(settings(tmp_path, {"a": "x"}))
    with pytest.raises(DataError, match=r"lm-evaluation-harness is not installed .* pip install -e '.\[harness\]'"):
        harness.require(settings(tmp_path, {"a": "x"}, harness_tasks="arc_easy"))
    assert harness.run(settings(tmp_path, {"a": "x"}), {"a": "mark"}) is None


def test_the_command_names_tasks_and_local_files(tmp_path):
    made = harness.command(
        settings(tmp_path, {}, harness_folder="f", harness_limit=3), "models/a", ["arc", "own"], tmp_path / "o"
    )
    assert made[1:] == [
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={Path('models/a').resolve()}",
        "--tasks",
        "arc,own",
        "--batch_size",
        "32",
        "--seed",
        "0",
        "--output_path",
        str(tmp_path / "o"),
        "--include_path",
        ".",
        "--limit",
        "3",
    ]


@pytest.mark.skipif(
    not (BUILD / "lm_eval").is_dir(), reason="lm-evaluation-harness is not in build/harness: CONTRIBUTING.md says how"
)
def test_it_runs_offline_on_local_files(folders, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/colours.yaml").write_text(TASK)
    (tmp_path / "tasks/rows.jsonl").write_text(
        "".join(
            json.dumps({"question": f"sky {i}", "choices": [" blue", " loud"], "answer": i % 2}) + "\n"
            for i in range(4)
        )
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "eval.mtbench",
            f"sft={folders['sft']}",
            "--output",
            str(tmp_path / "out"),
            "--max-new-tokens",
            "2",
            "--harness-tasks",
            "colours",
            "--harness-folder",
            str(tmp_path / "tasks"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": str(BUILD),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "home"),
        },
    )
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out/results.json").read_text())["harness"]["sft"]["colours"]
    assert (
        row["examples"] == 4
        and 0 <= row["metrics"]["acc"]["value"] <= 1
        and "colours" in (tmp_path / "out/report.html").read_text()
    )
