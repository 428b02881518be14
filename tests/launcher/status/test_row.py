"""One text for a stage's state, wherever it is shown."""

import json
from io import StringIO

import pytest
from rich.console import Console

from launcher.run.folder import Run
from launcher.run.progress import Progress
from launcher.status import failures, row, state, sweep_table, table
from launcher.status.state import RunStatus, StageState
from launcher.status.watch import plain_line

FAILED = StageState(
    "sft", "failed", "rank 3 ran out of memory", kind="cuda oom", advice="halve micro_batch", progress=Progress(7, 20)
)
REQUEUED = StageState(
    "sft",
    "requeued",
    "Slurm holds it back",
    progress=Progress(7, 20),
    previous={"attempt": 1, "class": "saved", "cause": "saved iteration 7"},
)


@pytest.fixture
def sweep(tmp_path):
    """A sweep of one run, without stages' files."""
    folder = tmp_path / "lr"
    (folder / "0").mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"id": "lr-1", "values": [{"sft.lr": 1e-5}]}))
    run = {"id": "lr-1.0", "profile": "local", "sweep": {"id": "lr-1", "index": 0}}
    (folder / "0/config.json").write_text(json.dumps({"run": run, "profile": {"scheduler": "none"}}))
    return folder


@pytest.mark.parametrize("stage", [FAILED, REQUEUED], ids=lambda stage: stage.state)
def test_a_sweep_a_run_s_line_and_a_plain_line_show_the_same_texts(sweep, monkeypatch, stage):
    status = RunStatus(Run(sweep / "0"), [stage])
    monkeypatch.setattr(state, "statuses_of", lambda runs: [status])
    output = StringIO()
    Console(file=output, width=400).print(sweep_table.sweep_table(sweep))
    views = [
        output.getvalue(),
        "\n".join(table.runs_lines([status], 400, 0.0)),
        "\n".join(table.run_lines(status, 400, 0.0)),
        plain_line(stage, "", with_previous=True),
    ]
    for view in views:
        assert all(text in view for text in ("7/20", *row.situation(stage, 0.0))), view


def test_failures_name_the_class_the_advice_and_the_way_on(sweep):
    (text,) = failures.failures(RunStatus(Run(sweep / "0"), [FAILED]), ["sft"])
    assert text.splitlines() == [
        f"sft failed: {row.reason(FAILED)}",
        "  do: halve micro_batch",
        f"  log: {sweep / '0/sft/logs'}",
        f"  then: python -m launcher resume {sweep / '0'}",
    ]


def test_a_sweep_s_json_has_its_fields_whatever_the_table_shows(sweep, monkeypatch):
    monkeypatch.setattr(state, "statuses_of", lambda runs: [RunStatus(Run(sweep / "0"), [FAILED])])
    assert sweep_table.comparison(sweep) == [
        {
            "element": 0,
            "folder": str(sweep / "0"),
            "values": {"sft.lr": 1e-5},
            "state": "failed",
            "stage": "sft",
            "iteration": 7,
            "why": "rank 3 ran out of memory",
            "numbers": {},
        }
    ]
