"""What lies in runs/ and is no run, or a damaged one, never hides the others; and where a command
runs is never guessed."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from launcher.doctor import machine_findings, node_findings
from launcher.run.folder import Run, Runs, lock
from launcher.status import state
from tests.support.stub_project import ROOT
from training.errors import ConfigError

GONE = "ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nNodeName=localhost\n"


FOREIGN = {
    "model": ("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
    "torn": ("config.json", '{"run": {"id": "'),
    "list": ("config.json", "[]"),
    "graph": ("config.json", '{"run": {"pipeline": []}, "profile": {}}'),
    "sweep": ("sweep.json", "{}"),
    "half": ("sweep.json", '{"id": "lr-1", "values": [{"sft.lr": 1}, {"sft.lr": 2}]}'),
}


def test_foreign_folders_are_named_and_the_runs_are_shown(project):
    project.submit("--wait", "--until", "convert")
    for folder, (name, text) in FOREIGN.items():
        (project.folder / "runs" / folder).mkdir()
        (project.folder / "runs" / folder / name).write_text(text)
    shown = project.convoy("status")
    assert shown.returncode == 0 and "demo" in shown.stdout, shown.stderr
    watched = project.convoy("watch", timeout=20)
    assert watched.returncode == 1 and "convert   done" in watched.stdout, "stages are left"
    # a sweep that was killed while it was written has no run yet
    for folder in set(FOREIGN) - {"half"}:
        assert f"runs/{folder} is left out: " in shown.stderr and f"runs/{folder} is left out: " in watched.stderr
    for folder in ("model", "half"):
        alone = project.convoy("watch", folder, timeout=20)
        assert alone.returncode == 2 and "Traceback" not in alone.stderr and folder in alone.stderr, alone.stderr


@pytest.mark.parametrize(
    "path, text",
    [
        ("sft/status.json", '{"sta'),
        ("sft/status.json", "[]"),
        ("sft/status.json", '{"state": "running", "attempt": 1}'),
        ("ledger.jsonl", '[]\n"x"\n{"event": 7}\n{"time": 1}\n'),
        ("convert/DONE.json", "[]"),
        ("convert/DONE.json", "{}"),
        ("sft/metrics.jsonl", '{"iteration": "x", "total": null, "time": []}\n'),
        ("sft/latest", "x"),
        ("ledger.jsonl", "\xff\x00\n"),
    ],
)
def test_a_damaged_file_of_a_run_is_no_traceback(tmp_path, path, text):
    for name, damaged in (("good", False), ("bad", True)):
        folder = tmp_path / name
        (folder / "sft").mkdir(parents=True)
        (folder / "convert").mkdir()
        about = {"id": name, "folder": str(folder), "profile": "local"}
        (folder / "config.json").write_text(json.dumps({"run": about, "profile": {"scheduler": "local"}}))
        if damaged:
            (folder / path).write_text(text, encoding="latin-1")
    broken: list[str] = []
    seen = state.statuses_of(Runs.open([], tmp_path), broken=broken)
    assert "good" in [one.run.folder.name for one in seen] and len(seen) + len(broken) == 2
    assert all("bad" in line for line in broken)


def test_where_to_run_is_asked_on_a_login_node_and_can_be_remembered(project):
    """The controller named here never answers; that it is named at all makes this a machine of a
    cluster."""
    if not shutil.which("sbatch"):
        pytest.skip("Slurm is not installed")
    (project.folder / "gone.conf").write_text(GONE)
    project.environment.update(
        SLURM_CONF=str(project.folder / "gone.conf"), XDG_CONFIG_HOME=str(project.folder / "settings")
    )
    command = ("submit", "full-pipeline", "--name", "demo", "--until", "convert")
    refused = project.convoy(*command)
    assert refused.returncode == 2 and "no --profile says where to run" in refused.stderr, refused.stderr
    assert (
        "--profile local" in refused.stderr and "export CONVOY_PROFILE=" in refused.stderr and not project.run.exists()
    )
    project.environment["CONVOY_PROFILE"] = "local"
    planned = project.convoy(*command, "--dry-run")
    assert planned.returncode == 0 and "$CONVOY_PROFILE = local" in " ".join(planned.stdout.split()), planned.stderr
    (project.folder / "settings").mkdir()
    (project.folder / "settings/convoy.toml").write_text('profile = "site.toml"\n')
    (project.folder / "settings/site.toml").write_text('scheduler = "local"\n')
    del project.environment["CONVOY_PROFILE"]
    assert "profile site" in project.convoy(*command, "--dry-run").stdout
    assert "profile local: as asked" in " ".join(
        project.convoy(*command, "--dry-run", "--profile", "local").stdout.split()
    )
    (project.folder / "settings/convoy.toml").write_text('profil = "site.toml"\n')
    wrong = project.convoy(*command)
    assert wrong.returncode == 2 and "convoy.toml" in wrong.stderr and "expected one line, profile" in wrong.stderr
    project.environment["SLURM_CONF"] = "/nowhere"
    (project.folder / "settings/convoy.toml").unlink()
    here = project.convoy(*command, "--dry-run")
    assert here.returncode == 0 and "does not exist" in here.stdout, "no cluster: Slurm's programs alone are none"


def test_a_run_that_vanishes_ends_watch_with_its_reason(project):
    project.submit("--wait", "--until", "convert")
    os.remove(project.run / "config.json")
    with pytest.raises(Exception, match="not a run's configuration|no such file|No such file"):
        state.statuses_of([Run(project.run)])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_the_way_out(tmp_path, monkeypatch, number):
    """What the kernel answers on Lustre without -o flock and on NFS without its lock service;
    neither can be mounted in a test."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(ConfigError, match=rf"{tmp_path}/x: its file system has no locks .*--runs FOLDER"),
        lock(tmp_path / "x"),
    ):
        pass
    found = machine_findings.locks(tmp_path)
    assert found.level == "bad" and "has no locks" in found.follows
    Run(tmp_path).record("written all the same")  # a stage that ends must be able to say so
    assert [event["event"] for event in Run(tmp_path).ledger()] == ["written all the same"]


def test_a_line_of_the_ledger_waits_for_another_host_s(tmp_path):
    Run(tmp_path).record("first")
    with lock(tmp_path / "ledger.jsonl"):
        writer = threading.Thread(target=Run(tmp_path).record, args=("second",))
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and len(Run(tmp_path).ledger()) == 1
    writer.join(5)
    assert [event["event"] for event in Run(tmp_path).ledger()] == ["first", "second"]


@pytest.mark.parametrize("held, level", [(True, "ok"), (False, "bad")])
def test_doctor_sees_whether_a_lock_holds_on_the_node(tmp_path, held, level):
    (tmp_path / "canary").touch()
    with lock(tmp_path / "canary") if held else contextlib.nullcontext():
        code = f"import runpy; print(runpy.run_path({str(ROOT / 'launcher/slurm/node_probe.py')!r})['lock']({str(tmp_path / 'canary')!r}))"
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert [finding.level for finding in node_findings._lock("Node n1", "seen", seen)] == [level]
