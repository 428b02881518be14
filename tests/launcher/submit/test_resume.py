"""What ``resume`` mends, changes and refuses, with stub stages and the commands that a user
types."""

import hashlib
import json
import os
import socket
import time

from launcher.run.folder import Run, this_process
from tests.support.stub_project import wait_until

ORDER = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]
CHECKPOINTS = "sft/checkpoints/iter_000000"


def started(project) -> list[str]:
    return [event["stage"] for event in project.ledger("started")]


def age(project, seconds: float) -> None:
    """Make all of the run look as old as that."""
    then = time.time() - seconds
    for path in project.run.rglob("*"):
        os.utime(path, (then, then))


def test_a_lost_or_torn_manifest_is_made_again_and_nothing_runs_twice(project):
    project.submit("--wait")
    identity = project.json("sft/DONE.json")["identity"]
    (project.run / "sft/DONE.json").unlink()
    (project.run / "convert/DONE.json").write_text('{"identity": "')
    assert "damaged" not in project.convoy("status").stderr
    resumed = project.convoy("resume", "demo", "--wait")
    assert resumed.returncode == 0, resumed.stderr
    assert "sft: DONE.json was lost; its outputs are whole, it was made again" in resumed.stdout
    assert "convert: DONE.json was damaged" in resumed.stdout and "nothing left to do" in resumed.stdout
    assert started(project) == ORDER and project.json("sft/DONE.json")["identity"] == identity


def test_a_parent_that_was_harmed_after_its_end_runs_again_and_so_does_what_follows(project):
    project.submit("--wait", "--until", "sft")
    (project.run / f"{CHECKPOINTS}3/model/weights").write_text("sft 4")
    failed = project.submit("--wait")
    assert failed.returncode == 1 and "does not have the sha256" in failed.stdout
    resumed = project.convoy("resume", "demo", "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "sft runs again:" in resumed.stdout


def test_load_iteration_refuses_a_checkpoint_that_does_not_match_its_hashes(project):
    project.submit("--wait", "--until", "sft")
    folder = project.run / f"{CHECKPOINTS}2"
    (folder / "SHA256").write_text(f"{hashlib.sha256(b'sft 2').hexdigest()}  model/weights\n")
    (folder / "model/weights").write_text("sft 3")  # a flipped bit
    refused = project.convoy("resume", "demo", "--from", "sft", "--load-iteration", "2")
    assert refused.returncode == 2 and "does not have the sha256 that SHA256 lists" in refused.stderr
    assert "present: 1, 2, 3" in refused.stderr and (project.run / "sft/DONE.json").exists()


def test_from_begins_a_stage_anew_and_keeps_what_was_there(project):
    project.submit("--wait")
    again = project.convoy("resume", "demo", "--from", "rlhf", "--wait")
    assert again.returncode == 0 and "rlhf starts over; what it had is in runs/demo/rlhf.1" in again.stdout
    assert [(event["stage"], event["iteration"]) for event in project.ledger("started")][6:] == [
        ("rlhf", None),
        ("export", None),
        ("mtbench", None),
    ]
    assert (project.run / "rlhf.1/DONE.json").exists()


def test_a_changed_configuration_is_shown_with_what_follows_and_wants_a_yes(project):
    project.behave(reward={"fail_at": 2})
    project.submit("--wait")
    change = ("resume", "demo", "--set", "sft.lr=0.5", "--set", "reward.weight_decay=0.2")
    asked = project.convoy(*change)
    assert asked.returncode == 2 and "add --yes" in asked.stderr
    assert "sft.lr: 0.003 -> 0.5" in asked.stdout
    assert "=> sft starts over, and so does what was made from it: reward" in asked.stdout
    assert project.json("config.json")["sft"]["lr"] == 0.003, "nothing is written before the yes"
    (project.folder / "mended").touch()
    resumed = project.convoy(*change, "--yes", "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert started(project) == ["convert", "sft", "reward", *ORDER[1:]]
    assert project.json("sft/config.json")["lr"] == 0.5 and project.json("reward/config.json")["weight_decay"] == 0.2
    assert (project.run / "sft.1/DONE.json").exists()


def test_a_stage_that_has_not_finished_goes_on_with_the_new_values_and_one_may_be_made_longer(project):
    project.behave(sft={"fail_at": 3})
    project.submit("--wait")
    (project.folder / "mended").touch()
    resumed = project.convoy("resume", "demo", "--set", "sft.lr=0.5", "--yes", "--wait")
    assert "=> sft goes on from iteration 2, with the new values" in resumed.stdout and resumed.returncode == 0
    longer = project.convoy("resume", "demo", "--set", "sft.iterations=5", "--yes", "--wait")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert "=> sft goes on from iteration 3" in longer.stdout and project.json("sft/DONE.json")["iteration"] == 5
    assert [event["iteration"] for event in project.ledger("started") if event["stage"] == "sft"] == [None, 2, 3]


def test_a_mistake_in_the_change_is_said_and_the_same_values_change_nothing(project):
    project.submit("--wait", "--until", "convert")
    wrong = project.convoy("resume", "demo", "--set", "sft.lrr=1")
    assert wrong.returncode == 2 and "did you mean sft.lr" in wrong.stderr
    same = project.convoy("resume", "demo", "--set", "sft.lr=0.003", "--wait")
    assert same.returncode == 0 and "->" not in same.stdout


def test_a_runner_on_a_vanished_host_is_taken_over_once_it_is_silent(project):
    project.submit("--wait", "--until", "convert")
    run = Run(project.run)
    ghost = {**this_process(), "host": "gone-17", "pid": 4242}
    run.record("runner", stages=ORDER[1:], **ghost)
    run.write_status("sft", state="running", attempt=1, cause="", job=None, started=time.time(), ended=None, **ghost)
    (project.run / "sft/metrics.jsonl").write_text("")
    assert (
        "being worked on by a local runner (process 4242 on gone-17)"
        in project.convoy("resume", "demo", "--all").stdout
    )
    early = project.convoy("resume", "demo", "--take-over")
    assert early.returncode == 2 and "was written to" in early.stderr
    refused = project.convoy("cancel", "demo")
    assert refused.returncode == 2 and "resume runs/demo --take-over" in refused.stderr
    age(project, 300)
    taken = project.convoy("resume", "demo", "--take-over", "--all", "--wait")
    assert taken.returncode == 0 and "taken over from process 4242 on gone-17" in taken.stdout, (
        taken.stdout + taken.stderr
    )
    assert project.ledger("taken over")[0]["host"] == "gone-17"


def test_a_runner_on_this_host_is_not_taken_over(project):
    project.behave(sft={"step_s": 0.2})
    project.convoy("submit", "full-pipeline", "--name", "demo", "--profile", "local", "--set", "sft.iterations=500")
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    refused = project.convoy("resume", "demo", "--take-over")
    assert refused.returncode == 2 and "on this host works on" in refused.stderr
    said = project.convoy("cancel", "demo")
    assert (
        said.returncode == 0
        and "stopped the local runner" in said.stdout
        and "sft was running at iteration" in said.stdout
    )
    assert f"on {socket.gethostname()}" not in said.stdout


def test_a_run_of_a_cluster_that_is_gone_goes_on_here_and_its_jobs_are_disowned(project):
    """No one listens at the port of its controller; where Slurm is not installed its commands are
    not there at all."""
    project.submit("--wait", "--until", "convert")
    config = project.json("config.json")
    config["profile"]["scheduler"] = "slurm"
    (project.run / "config.json").write_text(json.dumps(config))
    Run(project.run).record("submitted", stage="sft", job=77, after=[])
    (project.folder / "gone.conf").write_text(
        "ClusterName=gone\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\n"
        "AuthType=auth/none\nNodeName=localhost\n"
    )
    project.environment["SLURM_CONF"] = str(project.folder / "gone.conf")
    age(project, 300)
    stuck = project.convoy("resume", "demo")
    assert stuck.returncode == 1 and "--profile local --take-over" in stuck.stderr
    asked = project.convoy("resume", "demo", "--profile", "local", "--take-over", "--all", "--yes", "--wait")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "taken over from job 77 (sft)" in asked.stdout
    assert Run(project.run).disowned() == {77} and not Run(project.run).uses_slurm()
    assert {row["state"] for row in project.states().values()} == {"done"}


def test_status_of_all_runs_is_a_line_each_and_json_a_table_a_stage(project):
    project.submit("--wait", "--until", "sft")
    project.convoy("submit", "full-pipeline", "--name", "other", "--profile", "local", "--wait", "--until", "convert")
    lines = project.convoy("status").stdout.splitlines()
    assert [line.split()[:1] for line in lines] == [["run"], ["other"], ["demo"]], "the last active one first"
    both = json.loads(project.convoy("status", "demo", "other", "--json").stdout)
    assert len(both) == 12 and {row["run"] for row in both} == {"demo", "other"}
    sft = next(row for row in both if (row["run"], row["stage"]) == ("demo", "sft"))
    assert (sft["state"], sft["iteration"], sft["total"], sft["saved"], sft["class"], sft["trouble"]) == (
        "done",
        3,
        3,
        3,
        "",
        "",
    )
    none = project.convoy("status", "--runs", "nowhere")
    assert none.returncode == 2 and "no run in nowhere" in none.stderr


def test_status_shows_class_cause_advice_rank_and_its_last_lines(project):
    project.behave(sft={"fail_at": 2, "rank": 1, "step_s": 0.3})
    project.submit("--wait")
    shown = project.convoy("status", "demo").stdout
    row = project.states()["sft"]
    assert row["class"] and f"{row['class']}: rank 1" in shown and row["rank"] == 1
    assert f"do: {row['advice']}" in shown and "last lines of rank 1, more by: logs runs/demo sft --errors" in shown
    assert "| RuntimeError: loss is nan at iteration 2" in shown
    errors = project.convoy("logs", "demo", "sft", "--errors").stdout
    assert "[1] Traceback (most recent call last):" in errors and "[1] RuntimeError: loss is nan" in errors


def test_watch_in_a_pipe_says_each_change_once_and_its_exit_code_is_the_runs(project):
    project.submit("--wait", "--until", "sft")
    watched = project.convoy("watch", "demo")
    assert watched.returncode == 1, "stages are left"
    assert [line.split()[1:3] for line in watched.stdout.splitlines()] == [["convert", "done"], ["sft", "done"]]
    project.submit("--wait")
    assert project.convoy("watch", "demo").returncode == 0
