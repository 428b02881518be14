"""Attempts with real processes and no Slurm: early signals, hung ranks, operator files, damaged
checkpoints, contracts between stages."""

import collections
import hashlib
import json
import platform
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from launcher import run_module
from launcher.config.stages import ALL
from launcher.job import deadline
from launcher.job.attempt import Attempt
from launcher.job.outcome import AttemptFacts, OutcomeKind, classify
from launcher.job.rank_log import Log
from launcher.job.ranks import LocalRanks
from launcher.run import manifest
from launcher.run.folder import Run
from launcher.run.manifest import Refused
from launcher.slurm.commands import SlurmError
from launcher.slurm.queue import Job
from launcher.status import state
from tests.support.stub_project import wait_until
from training.checkpoint import checksums

HUNG = """
import faulthandler, time
faulthandler.enable()
def waits_for_a_peer():
    time.sleep(60)
print("ready", flush=True)
waits_for_a_peer()
"""
LATE = """
import signal, sys, time
time.sleep(0.7)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(60)
"""


def attempt(tmp_path, program: str, ranks: int = 1) -> tuple[Attempt, LocalRanks]:
    (tmp_path / "sft").mkdir()
    made = Attempt(Run(tmp_path), ALL["sft"], None, 60, 300, print)
    return made, LocalRanks(Log(tmp_path / "sft/log"), [sys.executable, "-c", program], ranks, {})


def test_ranks_of_which_nothing_is_heard_say_where_they_are_and_are_ended(tmp_path):
    made, ranks = attempt(tmp_path, HUNG, 2)
    wait_until(lambda: (tmp_path / "sft/log").read_text().count("ready") == 2, 30, "both ranks")
    made.stall_s = 1
    exits = made.wait(ranks)
    outcome = classify(AttemptFacts("sft", exits, hung_minutes=60))
    assert (
        outcome.kind is OutcomeKind.COMMUNICATION
        and outcome.may_requeue
        and "no line, metric or checkpoint of any rank" in outcome.cause
    )
    log = (tmp_path / "sft/log").read_text()
    assert "waits_for_a_peer" in log and "[0]" in log and "[1]" in log


def test_a_request_to_save_during_the_imports_kills_nobody_and_is_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.job.attempt.REPEAT_S", 0.2)
    made, ranks = attempt(tmp_path, LATE)
    made.stop_reason = OutcomeKind.TIME_LIMIT
    assert [rank.code for rank in made.wait(ranks)] == [75]


def test_secrets_are_masked_in_the_log(tmp_path):
    log = Log(tmp_path / "log", {"KEY": "sk-very-secret"})
    ranks = LocalRanks(
        log,
        [sys.executable, "-c", "import os; raise ValueError('no ' + os.environ['KEY'])"],
        1,
        {"KEY": "sk-very-secret"},
    )
    exits = ranks.wait(lambda: None)
    assert exits[0].line == "ValueError: no ********"
    assert "sk-very-secret" not in (tmp_path / "log").read_text()
    words = tmp_path / "log.words/rank_0.json"
    words.parent.mkdir()
    words.write_text(json.dumps({"class": "bug", "message": "KeyError: sk-very-secret"}))
    assert (
        log.rank_exit(0, 1).describe() == "rank 0: exit code 1: KeyError: ********"
        and "sk-very" not in words.read_text()
    )


def sums(folder) -> None:
    """The SHA256 file that a real trainer's save leaves."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "SHA256")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in names)
    (folder / "SHA256").write_text("".join(lines))


def test_a_stage_that_stopped_early_is_done_at_its_best_and_one_that_died_is_not(project):
    """Iterations 1 to 3 are saved; 2 was the best."""
    assert project.submit("--wait", "--until", "sft").returncode == 0
    stage, run = project.run / "sft", Run(project.run)
    (stage / "latest").write_text("2\n")
    with pytest.raises(Refused, match="sft exited 0 at iteration 2 of 3: it did not finish"):
        manifest.make(run, ALL["sft"], 1, 0.0)
    for said, done in (
        ({"misses": 1, "patience": 1, "ended": 3}, True),
        ({"misses": 0, "patience": 1, "ended": 3}, True),
        ({"misses": 1, "patience": 1, "ended": 2}, True),
        ({"misses": 0, "patience": 1, "ended": 2}, False),
        ({"misses": 1, "patience": 1, "ended": 3, "iteration": 1}, False),
    ):
        said = {"iteration": 2, **said}
        (stage / "chosen.json").write_text(json.dumps(said))
        if not done:
            with pytest.raises(Refused, match="sft exited 0 at iteration 2 of 3: it did not finish"):
                manifest.make(run, ALL["sft"], 1, 0.0)
            continue
        made = manifest.make(run, ALL["sft"], 1, 0.0)
        assert made["iteration"] == 2 and made["chosen"] == said
        assert any("iter_0000002" in name for name in made["outputs"]) and not any(
            "iter_0000003" in name for name in made["outputs"]
        )
        manifest.write(run, ALL["sft"], made)
        manifest.verify(run, ALL["sft"])


def test_a_flipped_bit_is_never_certified_and_the_checkpoint_before_it_is_used(project):
    assert project.submit("--wait", "--until", "sft").returncode == 0
    for number in (2, 3):
        sums(project.run / f"sft/checkpoints/iter_000000{number}")
    weights = project.run / "sft/checkpoints/iter_0000003/model/weights"
    weights.write_bytes(bytes([weights.read_bytes()[0] ^ 1]) + weights.read_bytes()[1:])
    (project.run / "sft/DONE.json").unlink()
    with pytest.raises(Refused, match=r"weights \(5 bytes\) does not have the sha256 that SHA256 lists"):
        manifest.make(Run(project.run), ALL["sft"], 1, 0.0)
    assert project.submit("--wait", "--until", "sft").returncode == 0
    assert [event["iteration"] for event in project.ledger("started") if event["stage"] == "sft"] == [None, 2]
    assert project.ledger("bad checkpoint")[0]["iteration"] == 3
    assert weights.read_text() == "sft 3" and (project.run / "sft/checkpoints.aside/iter_0000003").is_dir()


def test_each_output_is_read_once_when_a_stage_is_called_done(project, monkeypatch):
    """Also a checkpoint, whose own SHA256 is checked then."""
    assert project.submit("--wait", "--until", "sft").returncode == 0
    read, digest = collections.Counter(), checksums.digest
    monkeypatch.setattr(checksums, "digest", lambda path: (read.update([str(path)]), digest(path))[1])
    outputs = manifest.make(Run(project.run), ALL["sft"], 1, 0.0)["outputs"]
    assert outputs == project.json("sft/DONE.json")["outputs"]
    assert read == collections.Counter(str(project.run / name) for name in outputs) and len(read) == 3


@pytest.mark.parametrize(
    "ended, kind, words",
    [
        ("PREEMPTED", "preempted", "it was preempted before it could save"),
        ("NODE_FAIL", "node failure", "its node failed"),
        ("TIMEOUT", "time limit", "time limit"),
        ("OUT_OF_MEMORY", "host oom", "memory"),
        ("FAILED", "", "failed"),
    ],
)
def test_a_job_that_slurm_ended_with_its_supervisor_is_called_what_slurm_calls_it(project, ended, kind, words):
    assert project.submit("--wait", "--until", "convert").returncode == 0
    run = Run(project.run)
    run.write_status("sft", state="running", attempt=1, job=5, cause="", **{"class": ""})
    row = state._stage_state(state.RunRecords(run), ALL["sft"], Job(5, ended), "")
    assert (row.state, row.kind) == ("failed", kind) and words in row.why and bool(row.advice) == bool(kind)


def test_versions_are_those_of_the_ranks_and_never_the_host_s_for_a_container(project, tmp_path):
    assert project.submit("--wait", "--until", "convert").returncode == 0
    run, left = Run(project.run), tmp_path / "versions.json"
    assert manifest.versions(run)["python"] == platform.python_version() and "torch" in manifest.versions(run)
    left.write_text(json.dumps({"python": "3.12.3", "torch": "2.9.0a0+nv25.10"}))
    assert manifest.versions(run, left)["torch"] == "2.9.0a0+nv25.10" and "transformers" not in manifest.versions(
        run, left
    )
    config = project.json("config.json")
    config["profile"]["container"] = {"runtime": "pyxis", "image": "site+convoy+1.sqsh"}
    (project.run / "config.json").write_text(json.dumps(config))
    inside = manifest.versions(run, left)
    assert (inside["container"], inside["python"]) == ("site+convoy+1.sqsh", "3.12.3")
    left.write_text("[1")
    assert set(manifest.versions(run, left)) <= {"container", "commit"}


def test_a_stage_that_begins_while_stop_is_there_starts_nothing(project):
    assert project.submit("--wait", "--until", "convert").returncode == 0
    (project.run / "STOP").touch()
    process = subprocess.run(
        [sys.executable, "-m", "launcher.job.supervise", "runs/demo", "sft"],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 143, process.stdout
    assert project.json("sft/status.json")["state"] == "stopped" and not (project.run / "sft/rank_0.json").exists()
    assert "file STOP" in project.json("sft/status.json")["cause"]


def test_contracts_between_stages(project):
    """One chain, harmed in turn; each harm is undone before the next."""
    assert project.submit("--wait", "--until", "reward").returncode == 0
    run = Run(project.run)
    manifest.verify(run, ALL["reward"], "rlhf")
    remembered = project.json("rlhf/verified.json")
    weights = project.run / "reward/checkpoints/iter_0000003/model/weights"
    assert str(weights) in remembered
    weights.write_text("REWARD 3")  # the same length
    with pytest.raises(Refused, match="does not have the sha256"):
        manifest.verify(run, ALL["reward"], "rlhf")
    weights.write_text("reward 3")
    manifest.verify(run, ALL["reward"], "rlhf")

    path = project.run / "reward/DONE.json"
    whole = path.read_text()
    for harm, reason in (
        ({"iteration": 0}, "marked done at iteration 0"),
        ({"iteration": 2}, "was changed by hand"),
        ({"run": "other"}, "is of run other"),
    ):
        path.write_text(json.dumps(json.loads(whole) | harm))
        with pytest.raises(Refused, match=reason):
            manifest.verify(run, ALL["reward"])
    path.write_text(whole[:100])
    with pytest.raises(Refused, match="is not JSON"):
        manifest.verify(run, ALL["reward"])
    path.write_text(whole)

    other = project.json("sft/DONE.json") | {"identity": "0" * 64}
    (project.run / "sft/DONE.json").write_text(json.dumps(other))
    with pytest.raises(Refused, match="reward was made from another sft"):
        manifest.verify(run, ALL["reward"])


def test_a_job_that_was_declared_dead_leaves_the_run_as_it_is(project):
    assert project.submit("--wait", "--until", "convert").returncode == 0
    Run(project.run).record("taken over", jobs=[77])
    before = {path: path.read_bytes() for path in project.run.rglob("*.json*")}
    process = subprocess.run(
        run_module.command("launcher.job.supervise", "runs/demo", "sft"),
        cwd=project.folder,
        env={**project.environment, "SLURM_JOB_ID": "77"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and "job 77 was declared dead" in process.stdout, process.stdout + process.stderr
    assert {path: path.read_bytes() for path in project.run.rglob("*.json*")} == before


def test_ranks_are_told_of_a_term_before_slurm_is_asked_why(tmp_path, monkeypatch):
    """A slow controller answers after seconds, and Slurm kills all KillWait after the TERM."""
    order = []

    def late(job):
        order.append("asked")
        raise SlurmError("did not answer in 20 s")

    monkeypatch.setattr(deadline, "ask", late)
    (tmp_path / "sft").mkdir()
    attempt = Attempt(Run(tmp_path), ALL["sft"], 7, 60, 150, print)
    attempt.ranks = SimpleNamespace(log=Log(tmp_path / "log"), send_signal=order.append)
    attempt.on_signal(signal.SIGTERM)
    attempt.poll()
    assert order[0] == signal.SIGUSR1 and "asked" in order
