"""A run that another user made, or that was damaged: what its files name and hold is not
believed."""

import json
import os

import pytest

from launcher.config.stages import PIPELINES
from launcher.run import manifest
from launcher.run.folder import Run, hash_of, write_json
from tests.support.stub_project import small

SFT = PIPELINES["ppo"]["sft"]


@pytest.fixture
def demo(project):
    """A run whose conversion and SFT are done, and a command that begins a branch of it."""
    assert project.submit("--until", "sft", "--wait").returncode == 0

    def branch():
        return project.convoy(
            "submit",
            "full-pipeline",
            "--name",
            "branch",
            "--profile",
            "local",
            "--reuse",
            "demo",
            "--until",
            "sft",
            "--wait",
            *small("sft", "reward", "rlhf"),
        )

    return project, branch


def claim(project, name: str) -> None:
    """Let SFT's manifest list a file of this name, as its author can: identity and all."""
    path = project.run / "sft" / "DONE.json"
    made = json.loads(path.read_text())
    made["outputs"][name] = {
        "size": 5,
        "sha256": manifest.digests("", [project.folder / "evil"])[project.folder / "evil"],
    }
    made["identity"] = hash_of({key: made[key] for key in manifest.IDENTITY})
    path.write_text(json.dumps(made))


@pytest.mark.parametrize(
    "name", ["../../outside/keys", "sft/../../../outside/keys", "{folder}/outside/keys", "sft/link/keys"]
)
def test_what_a_manifest_names_outside_its_run_is_neither_read_nor_written(demo, name):
    project, branch = demo
    (project.folder / "evil").write_text("evil!")
    (project.folder / "outside").mkdir()
    (project.folder / "outside/keys").write_text("evil!")
    (project.run / "sft/link").symlink_to(project.folder / "outside")
    claim(project, name.format(folder=project.folder))
    (project.folder / "outside/keys").write_text("mine.")
    refused = branch()
    assert refused.returncode in (1, 2) and "sft/DONE.json lists what is none of this run's" in refused.stderr, (
        refused.stderr
    )
    assert "Traceback" not in refused.stderr
    assert (project.folder / "outside/keys").read_text() == "mine."
    assert not (project.folder / "runs/branch/sft/DONE.json").exists()


def test_links_beside_the_outputs_of_another_run_are_not_followed(demo):
    project, branch = demo
    (project.folder / "key").write_text("a key of mine")
    (project.run / "sft/notes.txt").symlink_to(project.folder / "key")
    assert branch().returncode == 0
    assert (project.folder / "runs/branch/sft/metrics.jsonl").exists()
    assert not (project.folder / "runs/branch/sft/notes.txt").exists()


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"outputs": []}', "[" * 100_000, "9" * 5000, '{"identity": 5}']
)
def test_a_manifest_that_is_none_of_ours_is_named(tmp_path, content):
    run = Run(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/DONE.json").write_text(content)
    with pytest.raises(manifest.Refused, match=f"{tmp_path}/sft/DONE.json[ :].*remove it and resume"):
        manifest.read(run, "sft")


@pytest.mark.parametrize(
    "name", ["sft/status.json", "sft/DONE.json", "sft/metrics.jsonl", "sft/latest", "sft/logs/slurm-1.out"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_status_waits_for_no_pipe_and_reads_no_device(tmp_path, name, kind):
    from launcher.status import state

    write_json(tmp_path / "config.json", {"run": {"id": "x-1", "profile": "local"}, "profile": {"scheduler": "local"}})
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    row = next(row for row in state.status_of(Run(tmp_path)).stages if row.stage == "sft")
    assert (row.state, f"{path} is not a file" in row.why) == {
        "sft/status.json": ("failed", True),
        "sft/DONE.json": ("failed", True),
    }.get(name, ("not submitted", False))


@pytest.mark.parametrize(
    "damage",
    [
        {"state": 5},
        {"state": "odd"},
        {"attempt": "1"},
        {"attempt": 10**30},
        {"job": [1]},
        {"pid": "../../1"},
        {"host": 7},
        {"lines": "abc"},
        {"started": float("nan")},
        {"ended": 1e300},
        {"rank": {}},
        {"cause": None},
    ],
)
def test_a_damaged_status_is_a_failure_that_names_it_and_the_attempt_is_of_the_ledger(tmp_path, damage):
    run = Run(tmp_path)
    write_json(tmp_path / "config.json", {"run": {"id": "x-1", "profile": "local"}, "profile": {"scheduler": "local"}})
    run.record("started", stage="sft", attempt=3)
    known = {
        "state": "failed",
        "attempt": 3,
        "job": 5,
        "pid": 1,
        "pid_start": 1,
        "host": "a",
        "cause": "x",
        "lines": [],
    }
    write_json(tmp_path / "sft/status.json", known | damage)
    found = run.status("sft")
    assert found["state"] == "failed" and found["attempt"] == 3
    assert damage == {"cause": None} or f"{tmp_path}/sft/status.json: {next(iter(damage))} = " in found["cause"]
