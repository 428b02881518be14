"""The rows that a run trains on are those of its input files as they are, or the command says that
they are not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval.report import run_facts, run_folder
from launcher.run.folder import Run, write_json
from launcher.status import state, table
from tests.support.stub_project import SMALL
from training.checkpoint import checksums

ROW = '{"prompt": "Where does otter %d live?", "chosen": "In the %s.", "rejected": "No."}\n'


@pytest.fixture
def rows(project):
    """Writes the data file of the project: rows whose replies say ``place``."""

    def write(place: str) -> Path:
        path = project.folder / "rows.jsonl"
        path.write_text("".join(ROW % (number, place) for number in range(30)))
        return path

    write("lake")
    return write


def prepared(project) -> int:
    """Times that the rows were prepared."""
    return (project.folder / "prepared").read_text().count("once")


def submit(project, *arguments: str):
    return project.submit("--set", "data.source=rows.jsonl", "--set", "model.demo_vocab=270", "--wait", *arguments)


def test_a_file_that_was_edited_is_prepared_again_before_a_stage_has_used_it(project, rows):
    assert submit(project, "--until", "convert").returncode == 0 and prepared(project) == 1
    os.utime(project.folder / "rows.jsonl")  # touched, and the same bytes
    assert submit(project, "--until", "convert").returncode == 0 and prepared(project) == 1
    rows("pond")  # as long as before
    assert submit(project, "--until", "convert").returncode == 0 and prepared(project) == 2
    marker = project.run / "data" / "DONE.json"
    # damaged: made again
    marker.write_text(json.dumps({"config_hash": 1, "inputs": [], "files": 5}))
    assert submit(project, "--until", "convert").returncode == 0 and prepared(project) == 3


def test_other_rows_than_a_stage_has_used_are_refused_or_named(project, rows):
    assert submit(project, "--until", "sft").returncode == 0
    rows("pond")
    for command in ("plan", "submit"):
        refused = project.convoy(
            command,
            "full-pipeline",
            "--name",
            "demo",
            "--profile",
            "local",
            *SMALL,
            "--set",
            "data.source=rows.jsonl",
            "--set",
            "model.demo_vocab=270",
        )
        words = refused.stderr
        assert (
            refused.returncode == 2 and "data.source = 'rows.jsonl' changed after sft" in words and "--name" in words
        ), words
    done = project.convoy("resume", "demo", "--wait")
    assert done.returncode == 0 and "goes on with that" in done.stdout and prepared(project) == 1, (
        done.stdout + done.stderr
    )
    anew = project.convoy("resume", "demo", "--from", "sft", "--yes", "--wait")
    assert anew.returncode == 0 and prepared(project) == 2, anew.stdout + anew.stderr
    (project.folder / "rows.jsonl").unlink()  # its rows are there
    assert project.convoy("resume", "demo", "--wait").returncode == 0 and prepared(project) == 2


def test_other_weights_than_convert_has_used_are_refused(project, rows):
    assert submit(project, "--until", "convert").returncode == 0
    weights = project.folder / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    marker = project.run / "data" / "DONE.json"
    made = json.loads(marker.read_text())
    name = "model.safetensors of model.checkpoint"
    made["inputs"][name] = {"path": str(weights), **checksums.mark(weights, weights=True)}
    marker.write_text(json.dumps(made))
    os.utime(weights)
    assert submit(project, "--until", "convert").returncode == 0 and prepared(project) == 1
    weights.write_bytes(b"\1" * (1 << 20))
    refused = submit(project, "--until", "sft")
    assert refused.returncode == 2 and f"{name} = " in refused.stderr and "changed after convert of" in refused.stderr


def test_another_source_on_resume_begins_anew_what_has_used_the_old_rows(project, rows):
    assert submit(project, "--until", "sft").returncode == 0
    (project.folder / "other.jsonl").write_text("".join(ROW % (number, "sea") for number in range(30)))
    changed = project.convoy("resume", "demo", "--set", "data.source=other.jsonl", "--yes", "--wait")
    assert changed.returncode == 0 and "sft starts over" in changed.stdout + changed.stderr and prepared(project) == 2


def test_a_file_without_usable_rows_can_be_corrected(project, rows):
    (project.folder / "no_reward").touch()
    assert "no row" in submit(project, "--until", "reward").stderr
    (project.folder / "no_reward").unlink()
    rows("pond")
    assert submit(project, "--until", "reward").returncode == 0 and prepared(project) == 2


def test_what_was_dropped_and_cut_stands_in_status_and_report(tmp_path):
    run = Run(tmp_path)
    write_json(tmp_path / "config.json", {"run": {"id": "x", "profile": "local"}})
    write_json(
        tmp_path / "data" / "summary.json",
        {"stages": {}, "lines": [f"{n} of 9 rows dropped: \x1b[2J" for n in range(9)]},
    )
    seen = state.RunStatus(run, [], data=run.data_summary()["lines"])
    lines = table.data_lines(seen, 60)
    assert lines[0] == "data: 0 of 9 rows dropped: \ufffd[2J" and lines[6].startswith("data: 3 more such lines:")
    assert run_facts.data(run_folder.Run("x", tmp_path, {}))[0] == ("rows", "0 of 9 rows dropped: \x1b[2J")
    for damaged in ("", "[1]", '{"stages": {}, "lines": [5]}', '{"lines": 7}'):
        (tmp_path / "data" / "summary.json").write_text(damaged)
        assert run.data_summary() == {} and run_facts.data(run_folder.Run("x", tmp_path, {})) == []
