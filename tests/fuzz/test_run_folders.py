"""Damaged run folders: status, logs, resume's checks and mending, and the report take each in, or
name the file. No traceback, no hang, no memory, nothing outside the run's folder."""

import json
import os
import random
import shutil
import sys
import time
from collections import Counter

import pytest

from eval.errors import DataError
from eval.report import page
from launcher.config.sections import layered
from launcher.config.stages import PIPELINES, PPO, full_tables
from launcher.run import manifest
from launcher.run.folder import SWEEP, Failed, Run, Runs, hash_of, write_json
from launcher.slurm.commands import SlurmError
from launcher.status import logs, state, sweep_table, table
from launcher.status.terminal import UNSEEN
from launcher.submit import repair, resume
from launcher.submit.change import Wish
from tests.fuzz.damage import VALUES, damaged_bytes, damaged_json, damaged_text, peak_mb, within
from tests.support.evaluations import evaluate
from training.errors import ConfigError

REFUSALS = (ConfigError, manifest.Refused, Failed, DataError, SlurmError, OSError)
NUMBER, REPORTS = 600, 60
SWEEPS = 1000
SECONDS, MB = 5, 150
FILES = (
    "config.json",
    "ledger.jsonl",
    "sft/status.json",
    "sft/DONE.json",
    "sft/metrics.jsonl",
    "sft/config.json",
    "sft/chosen.json",
    "sft/latest",
    "sft/verified.json",
    "sft/logs/attempt_1.log",
    "sft/logs/supervise.log",
    "data/DONE.json",
    "data/counts.json",
)
JUDGED = (
    "mtbench/results.json",
    "mtbench/question.jsonl",
    "mtbench/model_answer/dpo.jsonl",
    "mtbench/heldout/sft.jsonl",
    "mtbench/model_judgment/j_single.jsonl",
    "mtbench/model_judgment/j_pair.jsonl",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder runs/hh with each of FILES and JUDGED, as a run leaves them."""
    run = Run(tmp_path_factory.mktemp("sound") / "hh")
    tables = full_tables(run.folder, layered("bloom-tiny", [], []), PIPELINES[PPO])
    about = {
        "id": "hh-1",
        "name": "hh",
        "recipe": "bloom-tiny",
        "profile": "local",
        "folder": "runs/hh",
        "pipeline": PPO,
    }
    profile = {"name": "local", "scheduler": "local", "device": "cpu"}
    write_json(run.config_file, {"run": about, **tables, "profile": profile})
    evaluate(run.folder / "mtbench")
    write_json(run.stage("sft") / "config.json", {"iterations": 3})
    write_json(run.stage("sft") / "chosen.json", {"misses": 1, "patience": 1, "ended": 3, "iteration": 3})
    write_json(run.stage("sft") / "verified.json", {"x": ["a", 1, 2, 3, 4]})
    (run.stage("sft") / "latest").write_text("3")
    weights = run.stage("sft") / "checkpoints" / "iter_0000003" / "weights"
    weights.parent.mkdir(parents=True)
    weights.write_text("sft 3")
    identity = {
        "stage": "sft",
        "iteration": 3,
        "config_hash": manifest.config_hash(run, "sft"),
        "parents": {"convert": "0" * 64},
        "outputs": {
            str(weights.relative_to(run.folder)): {"size": 5, "sha256": manifest.digests("", [weights])[weights]}
        },
    }
    write_json(
        run.stage("sft") / "DONE.json",
        {
            "identity": hash_of(identity),
            **identity,
            "run": "hh-1",
            "attempt": 1,
            "started": 1.0,
            "ended": 2.0,
            "versions": {"torch": "2"},
        },
    )
    write_json(
        run.stage("sft") / "status.json",
        {
            "state": "failed",
            "attempt": 1,
            "job": None,
            "cause": "rank 0: exit code 1",
            "started": 1.0,
            "ended": 2.0,
            "class": "bug",
            "advice": "look",
            "rank": 0,
            "lines": ["ValueError: no"],
            "pid": 1,
            "pid_start": 2,
            "host": "a",
            "iteration": 3,
            "began": 0,
        },
    )
    rows = [
        {"iteration": number, "total": 3, "time": 1e9 + number, "loss": 1 / number, "tokens_per_second": 10.0}
        for number in (1, 2, 3)
    ]
    (run.stage("sft") / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.stage("sft") / "logs").mkdir()
    (run.stage("sft") / "logs/attempt_1.log").write_text(
        "2026-11-23T14:00:00.000 [0] a line\n2026-11-23T14:00:01.000 [1] another\n"
    )
    (run.stage("sft") / "logs/supervise.log").write_text("2026-11-23 14:00:00.500 sft attempt 1\n")
    write_json(run.folder / "data/DONE.json", {"config_hash": "0" * 64, "inputs": {}, "files": {"sft.jsonl": 1}})
    write_json(run.folder / "data/counts.json", {"read": {"rows": 9}, "files": {"sft.jsonl": 9}})
    for event, fields in (
        ("submitted", {"stage": "sft", "job": 7, "after": []}),
        ("runner", {"stages": ["sft"], "pid": 1, "pid_start": 2, "host": "a"}),
        ("started", {"stage": "sft", "attempt": 1, "job": 7}),
        ("taken over", {"jobs": [7]}),
        ("done", {"stage": "sft", "attempt": 1, "class": "done"}),
        ("cancelled", {"jobs": {"sft": 7}}),
    ):
        run.record(event, **fields)
    return run.folder


def damage(rng: random.Random, path) -> None:
    """Damage one file: its JSON, its rows, its bytes, or what it is."""
    if rng.random() < 0.04:
        path.unlink()
        kind = rng.choice(("pipe", "device", "folder", "link", "absent"))
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind != "absent":
            path.symlink_to("/dev/zero" if kind == "device" else path.name)
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [
            damaged_text(rng, row) if rng.random() < 0.4 else json.dumps(row).encode()
            for row in damaged_rows(rng, rows)
        ]
        path.write_bytes(b"\n".join(lines) + rng.choice((b"\n", b"\n", b"", b"\n{")))
    elif path.suffix == ".json":
        path.write_bytes(damaged_text(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(damaged_bytes(rng, path.read_bytes()))


def damaged_rows(rng: random.Random, rows: list) -> list:
    made = damaged_json(rng, rows)
    return made if isinstance(made, list) else rows


def look_at(run: Run) -> None:
    """What status, watch, logs and resume do with a run."""
    seen = state.status_of(run)
    shown = [
        *table.run_lines(seen, 100, time.time()),
        *table.runs_lines([seen], 200, time.time()),
        *logs.show(run, "sft", "all"),
        *logs.show(run, "sft", last=2),
    ]
    assert not any(UNSEEN.sub("", line) != line for line in map(table.click.unstyle, shown)), shown
    json.dumps(state.as_json([seen]))
    resume.examine(seen, Wish(first="sft", iteration=3, sets=("sft.lr=1e-6",)))
    repair.heal(run)


def each(folder, sound, names, numbers, taken_in):
    """(outcomes, MB of growth) of ``taken_in(run, rng)`` for a damaged copy each; an error that is
    no refusal fails, with its number."""
    outcomes, before = Counter(), peak_mb()
    for number in numbers:
        rng, run = random.Random(number), folder / "runs" / "hh"
        shutil.copytree(sound, run, ignore=None if names != FILES else shutil.ignore_patterns("mtbench"))
        for name in dict.fromkeys(rng.choices(names, k=rng.choice((1, 1, 1, 2, 3)))):
            damage(rng, run / name)
        try:
            with within(SECONDS):
                taken_in(run, rng)
            outcomes["taken in"] += 1
        except REFUSALS as refused:
            said = str(refused)
            assert not isinstance(refused, TimeoutError) and said and "Traceback" not in said, (number, said)
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"damaged run {number}: {type(error).__name__}: {error}") from error
        for path in [run, *run.parent.glob("hh*")]:
            shutil.rmtree(path, ignore_errors=True)
    return outcomes, peak_mb() - before


def test_status_logs_and_resume(tmp_path, sound, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    outcomes, grown = each(
        tmp_path, sound, FILES, range(NUMBER), lambda run, rng: look_at(Run.open(run.relative_to(tmp_path)))
    )
    print(f"{NUMBER} damaged run folders: {dict(outcomes)}; memory grew by {grown:.0f} MB", file=sys.stderr)
    assert outcomes["taken in"] > NUMBER / 20 and outcomes["refused"] > NUMBER / 20 and grown < MB
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and not list((tmp_path / "runs").iterdir())


def test_the_report_is_made_of_all(tmp_path, sound):
    def made(run, rng):
        found = page.collect([run])
        page.write(found, run / "report.html")
        assert "Provenance" in (run / "report.html").read_text(encoding="utf-8")

    outcomes, grown = each(tmp_path, sound, (*FILES, *JUDGED * 2), range(NUMBER, NUMBER + REPORTS), made)
    print(f"{REPORTS} reports of damaged run folders: {dict(outcomes)}; memory grew by {grown:.0f} MB", file=sys.stderr)
    assert outcomes == {"taken in": REPORTS} and grown < MB


def test_sweeps(tmp_path, sound):
    """A damaged sweep.json, or another in its place."""
    whole, outcomes = {"id": "lr", "values": [{"sft.lr": 1e-5}, {"sft.lr": 1e-6}]}, Counter()
    for number in range(SWEEPS):
        folder, rng = tmp_path / "runs" / "lr", random.Random(number)
        for index in "01":
            (folder / index).mkdir(parents=True)
            shutil.copy(sound / "config.json", folder / index)
        (folder / SWEEP).write_bytes(damaged_text(rng, rng.choice((whole, whole, whole, rng.choice(VALUES)))))
        try:
            with within(SECONDS):
                for path in Runs.open([folder], tmp_path).sweeps:
                    sweep_table.sweep_table(path)
                    json.dumps(sweep_table.comparison(path))
            outcomes["taken in"] += 1
        except REFUSALS as refused:
            assert str(refused)
            outcomes["refused"] += 1
        shutil.rmtree(tmp_path / "runs")
    print(f"{SWEEPS} damaged sweeps: {dict(outcomes)}", file=sys.stderr)
    assert outcomes["taken in"] > SWEEPS / 20 and outcomes["refused"] > SWEEPS / 4
