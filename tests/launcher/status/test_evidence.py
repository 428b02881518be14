"""The table that decides a stage's state, row by row; a damaged manifest and what depends on it."""

import json
import os
from types import SimpleNamespace

import pytest

from launcher.config.stages import ALL
from launcher.run.folder import Run, this_process
from launcher.slurm.queue import Job
from launcher.status.evidence import RULES, Evidence, judge
from launcher.status.state import status_of

STATUS = {"state": "pending", "job": None, "cause": "", "attempt": 1}
SUBMITTED = {"event": "submitted", "stage": "sft", "job": 7, "time": 5.0}
FAILED = {"event": "failed", "stage": "sft", "job": 7, "time": 6.0}
QUEUED, RUNNING, ENDED = Job(7, "PENDING", "Priority"), Job(7, "RUNNING"), Job(7, "FAILED", source="sacct")
CANCELLED = Job(7, "CANCELLED", source="sacct")
RUNNER = {"stages": ["sft"], "time": 9.0}
ROWS = [
    ("its job waits in the queue", QUEUED, {}, SUBMITTED, {}, ("pending", "jobs of higher priority")),
    ("its job waits in the queue", QUEUED, {"state": "requeued", "job": 7}, None, {}, ("requeued", "")),
    ("its job waits in the queue", QUEUED, {"state": "running", "job": 7}, None, {}, ("requeued", "")),
    ("its job runs", RUNNING, {}, SUBMITTED, {}, ("running", "")),
    ("its job runs", Job(7, "COMPLETING"), {}, SUBMITTED, {}, ("running", "Slurm says completing")),
    ("its job runs", RUNNING, {"state": "failed", "job": 6}, FAILED, {}, ("running", "")),
    (
        "its supervisor wrote a bad end",
        RUNNING,
        {"state": "failed", "job": 7, "cause": "nan"},
        FAILED,
        {},
        ("failed", "nan"),
    ),
    ("it should run", None, {"state": "running", "job": 7}, None, {}, ("failed", "job 7 is gone from the queue")),
    ("it should run", None, {"state": "running", "job": 7}, None, {"trouble": "down"}, ("running", "as last heard of")),
    ("it should run", None, {"state": "running", **this_process()}, None, {}, ("running", "")),
    ("a local runner comes to it", None, {}, None, {"runner": RUNNER}, ("pending", "starts now")),
    (
        "a local runner comes to it",
        None,
        {},
        None,
        {"runner": RUNNER, "left": {"convert"}},
        ("pending", "waits for convert"),
    ),
    ("a manifest is damaged", None, {"state": "done"}, None, {"damage": "no JSON"}, ("failed", "no JSON")),
    (
        "its supervisor wrote a bad end",
        None,
        {"state": "stopped", "cause": "by a person"},
        None,
        {},
        ("stopped", "by a person"),
    ),
    ("its job ended before its start", ENDED, {}, SUBMITTED, {}, ("failed", "job 7: ")),
    ("its job ended before its start", CANCELLED, {}, SUBMITTED, {}, ("cancelled", "by hand")),
    ("its job ended before its start", CANCELLED, {}, SUBMITTED, {"cancelled": True}, ("cancelled", "with the run")),
    ("a submitted job is missing", ENDED, {}, {**SUBMITTED, "job": 8}, {}, ("lost", "")),
    (
        "a requeued job is missing",
        None,
        {"state": "requeued", "job": 7},
        None,
        {},
        ("lost", "not in the queue any more"),
    ),
    (
        "a retry has no process",
        None,
        {"state": "requeued", "cause": "hang"},
        None,
        {},
        ("failed", "hang, but no process"),
    ),
    ("a submitted job is missing", None, {}, SUBMITTED, {}, ("lost", "not in the queue any more")),
    ("a submitted job is missing", None, {}, SUBMITTED, {"trouble": "down"}, ("pending", "as last heard of")),
    ("a submitted job is missing", None, {"state": "failed"}, SUBMITTED, {}, ("lost", "")),
    ("none of these", None, {}, SUBMITTED, {"disowned": {7}}, ("not submitted", "")),
    ("none of these", None, {}, None, {}, ("not submitted", "")),
]


def evidence(folder, job, status, last, trouble="", **about) -> Evidence:
    """Of the stage sft; ``about``: what the run's records hold besides."""
    run = SimpleNamespace(
        folder=folder,
        stage=lambda name: folder / name,
        cancelled_since=lambda time, job: about.get("cancelled", False),
    )
    records = SimpleNamespace(
        run=run,
        status={"sft": {**STATUS, **status}},
        last_event=lambda stage: last,
        runner=about.get("runner"),
        left=about.get("left", set()),
        disowned=about.get("disowned", set()),
        damage=lambda stage: about.get("damage", ""),
    )
    return Evidence(records, ALL["sft"], job, trouble)


@pytest.mark.parametrize("name, job, status, last, about, expected", ROWS)
def test_each_row_of_the_table(tmp_path, name, job, status, last, about, expected):
    one = evidence(tmp_path, job, status, last, **about)
    assert next(rule.name for rule in RULES if rule.holds(one)) == name
    state, why = judge(one)
    assert state == expected[0] and expected[1] in why and (why == "" or expected[1] or state in ("requeued", "lost"))


def test_the_table_s_rows_are_all_tried():
    assert {row[0] for row in ROWS} == {rule.name for rule in RULES}


def test_a_damaged_manifest_fails_its_stage_and_what_was_built_from_it(done_run):
    (done_run.stage("reward") / "DONE.json").write_text("torn")
    rows = {row.stage: row for row in status_of(done_run).stages}
    states = {name: row.state for name, row in rows.items()}
    assert states == {
        "convert": "done",
        "sft": "done",
        "reward": "failed",
        **dict.fromkeys(("rlhf", "export", "mtbench"), "failed"),
    }
    assert str(done_run.stage("reward") / "DONE.json") in rows["reward"].why
    assert rows["rlhf"].why.startswith("it was built from reward: ")
    assert os.fspath(done_run.folder) in rows["mtbench"].why


@pytest.fixture
def done_run(tmp_path) -> Run:
    """A run whose stages have manifests that fit one another."""
    config = {"run": {"id": "x-1", "profile": "here", "folder": str(tmp_path)}, "profile": {"scheduler": "local"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = Run(tmp_path)
    for name, stage in run.stages.items():
        run.stage(name).mkdir()
        values = {"identity": f"identity of {name}", "stage": name, "run": "x-1", "config_hash": "", "iteration": None}
        values |= {"parents": {parent: f"identity of {parent}" for parent in stage.parents}, "outputs": {}}
        (run.stage(name) / "DONE.json").write_text(json.dumps(values))
    return run
