"""What supervise does inside real jobs: preflight, spares, deadlines, preemption, operator files,
hung ranks. The stages are stubs."""

import json
import sys
import time
from dataclasses import replace

import pytest

from launcher.config.stages import ALL
from launcher.job import deadline
from launcher.job.attempt import Attempt
from launcher.job.outcome import OutcomeKind
from launcher.job.rank_log import Log
from launcher.job.ranks import LocalRanks
from launcher.run.folder import Run
from tests.support.stub_project import ROOT, wait_until


def site(project, **lines) -> str:
    """A profile like dev with these lines in it -> its path."""
    path = project.folder / "site.toml"
    kept = [
        line
        for line in (ROOT / "slurm/clusters/dev.toml").read_text().splitlines()
        if line.partition(" =")[0] not in lines
    ]
    path.write_text("\n".join([*kept, *(f"{name} = {json.dumps(value)}" for name, value in lines.items()), ""]))
    return str(path)


def submit(project, *arguments, profile="dev", until="sft", iterations=3):
    done = project.submit("--until", until, "--set", f"sft.iterations={iterations}", *arguments, profile=profile)
    assert done.returncode == 0, done.stdout + done.stderr


def status(project, stage="sft") -> dict:
    path = project.run / stage / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "pending"}


def until(project, *states, stage="sft", seconds=60) -> dict:
    """Wait until the stage is in one of the states -> its status."""
    wait_until(
        lambda: status(project, stage)["state"] in states,
        seconds,
        f"{stage} {' or '.join(states)}: {status(project, stage)}",
    )
    return status(project, stage)


def saved(project) -> int:
    path = project.run / "sft/latest"
    return int(path.read_text()) if path.exists() else 0


def running(project, iteration=1) -> str:
    """Wait until the sft of the run has saved this iteration -> its job."""
    wait_until(
        lambda: saved(project) >= iteration and status(project)["state"] == "running",
        40,
        f"iteration {iteration} of sft",
    )
    return str(status(project)["job"])


def log(project, stage="sft") -> str:
    """What supervise itself said."""
    return "".join(path.read_text() for path in (project.run / stage / "logs").glob("slurm-*.out"))


def wait_for(project, event: str) -> dict:
    wait_until(lambda: project.ledger(event), 20, event)
    return project.ledger(event)[-1]


def starts(project) -> list[tuple[int, int | None]]:
    return [(event["attempt"], event["iteration"]) for event in project.ledger("started") if event["stage"] == "sft"]


NODE_CHECK = 'grep -qx "$SLURMD_NODENAME" bad_nodes && { echo "fan 3 has stopped"; exit 1; } || true'


def test_a_bad_node_is_left_out_for_a_spare(project, queue):
    (project.folder / "bad_nodes").write_text("127.0.1.1\n")
    submit(
        project,
        "--set",
        "resources.sft.nodes=2",
        "--set",
        "resources.sft.spares=1",
        profile=site(project, node_check=NODE_CHECK),
        until="sft",
    )
    assert until(project, "done", "failed")["state"] == "done"
    used = [project.json(f"sft/rank_{rank}.json") for rank in range(4)]
    assert {rank["SLURMD_NODENAME"] for rank in used} == {"127.0.1.2", "127.0.1.3"}
    assert {rank["MASTER_ADDR"] for rank in used} == {"127.0.1.2"}, "rank 0 runs where the others look for it"
    event = project.ledger("bad node")[-1]
    assert (event["stage"], event["node"], event["reason"]) == ("sft", "127.0.1.1", "node_check: fan 3 has stopped")
    assert starts(project) == [(1, None)]


def test_without_a_spare_the_job_queues_itself_again_without_the_bad_node(project, queue):
    (project.folder / "bad_nodes").write_text("127.0.1.1\n")
    submit(project, profile=site(project, node_check=NODE_CHECK, **{"options.exclude": "127.0.1.4"}), until="convert")
    assert until(project, "requeued", "done", stage="convert")["class"] == "preflight"
    cause = project.ledger("requeued")[0]["cause"]
    assert cause == "node 127.0.1.1: node_check: fan 3 has stopped; 0 good node(s), 1 needed"
    assert until(project, "done", "failed", stage="convert")["state"] == "done"
    assert project.json("convert/rank_0.json")["SLURMD_NODENAME"] == "127.0.1.2"
    job = project.ledger("started")[0]["job"]
    assert "ExcNodeList=127.0.1.1,127.0.1.4" in queue("scontrol", "show", "job", str(job)), "the user's own stays"
    assert [event["job"] for event in project.ledger("started")] == [job, job], "children wait for this id"
    assert "preflight: 1 of 1 node(s) good" in project.log("convert", 2)


def test_a_job_that_is_cancelled_during_its_preflight_blames_no_node(project, queue):
    submit(project, profile=site(project, node_check="touch checking; sleep 30"), until="convert")
    wait_until(lambda: (project.folder / "checking").exists(), 30, "preflight")
    queue("scancel", str(project.ledger("started")[0]["job"]))
    assert until(project, "cancelled", "failed", "requeued", stage="convert")["state"] == "cancelled"
    assert project.ledger("bad node") == []


def test_preemption_saves_and_goes_on_where_it_was(project, queue):
    """PreemptMode=REQUEUE without GraceTime: TERM to all, and Slurm queues the job again whatever
    happens."""
    project.behave(sft={"step_s": 0.2})
    submit(project, profile=site(project), iterations=30)
    number = running(project, 3)
    before = saved(project)
    queue("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(project, "requeued", seconds=20)
    event = wait_for(project, "requeued")
    assert event["class"] == "preempted" and event["iteration"] >= before and "saved iteration" in event["cause"]
    assert until(project, "done", "failed", "cancelled")["state"] == "done"
    assert starts(project) == [(1, None), (2, event["iteration"])]
    assert status(project)["job"] == int(number)


def test_preemption_with_grace_time_is_noticed_though_only_the_tasks_are_told(project, queue):
    project.behave(sft={"step_s": 0.2})
    submit(project, profile=site(project, partition="grace"), iterations=30)
    number = running(project, 2)
    queue("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    event = wait_for(project, "requeued")
    assert event["class"] == "preempted" and "saved iteration" in event["cause"]
    assert until(project, "done", "failed", "cancelled")["state"] == "done"
    assert status(project)["job"] == int(number) and starts(project)[1] == (2, event["iteration"])


def test_stop_saves_ends_and_is_not_queued_again(project, queue):
    project.behave(sft={"step_s": 0.2})
    submit(project, until="reward", iterations=500)
    number = running(project, 2)
    (project.run / "STOP").touch()
    ended = until(project, "stopped", seconds=20)
    assert (
        ended["class"] == "stopped" and ended["cause"] == f"told to stop (file STOP); saved iteration {saved(project)}"
    )
    assert "resume removes the file STOP" in ended["advice"]
    wait_until(
        lambda: queue("squeue", "-h", "-t", "all", "-j", number, "-o", "%T").strip() == "FAILED", 20, "the job's end"
    )
    assert not (project.run / "reward/rank_0.json").exists(), "its children must not run"


def test_stop_ends_a_stage_without_checkpoints(project, queue):
    project.behave(convert={"step_s": 60})
    submit(project)
    wait_until(lambda: (project.run / "convert/rank_0.json").exists(), 30, "convert")
    (project.run / "STOP").touch()
    ended = until(project, "stopped", "failed", stage="convert", seconds=20)
    assert ended["state"] == "stopped" and ended["cause"] == "told to stop (file STOP); what is done is kept"


def test_save_saves_goes_on_and_the_file_is_removed(project, queue):
    project.behave(sft={"step_s": 0.2, "save_every": 1000})
    submit(project, iterations=40)
    wait_until(lambda: (project.run / "sft/metrics.jsonl").exists(), 30, "first step")
    (project.run / "SAVE").touch()
    wait_until(lambda: not (project.run / "SAVE").exists(), 20, "the file's end")
    kept = saved(project)
    assert 0 < kept < 40 and status(project)["state"] == "running"
    assert until(project, "done", "failed")["state"] == "done" and starts(project) == [(1, None)]
    assert f"file SAVE: iteration {kept} is saved" in log(project)


RANK = """
import signal, sys, time
time.sleep(0.5)  # imports: whoever asks now is not heard
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(60)
"""


def test_the_deadline_is_the_end_that_slurm_has_set_less_what_a_step_and_a_save_took(
    queue, slurm, tmp_path, monkeypatch
):
    """A job of 10 minutes; steps and saves so far took 280 s together. The ranks are processes of
    this machine."""
    monkeypatch.setenv("SLURM_CONF", slurm["SLURM_CONF"])
    job = int(queue("sbatch", "--parsable", "--time=10", "--output=/dev/null", "--wrap=sleep 600"))
    run = Run(tmp_path)
    (tmp_path / "sft").mkdir()
    try:
        wait_until(lambda: deadline.ask(job).state == "RUNNING", 20, "job")
        now = deadline.ask(job).start
        rows = [{"iteration": 1, "time": now + 10}, {"iteration": 2, "time": now + 110, "save_s": 100.0}]
        (tmp_path / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run.record("started", stage="sft", attempt=1)
        made = Attempt(run, ALL["sft"], job, 60, 150, print)
        lead = 100 + deadline.SAVE_FACTOR * 100 + deadline.MARGIN_S
        assert made.deadline.seconds_to_save() == pytest.approx(600 - lead, abs=5)
        queue("scontrol", "update", f"jobid={job}", "timelimit=6")
        made.deadline.refresh()
        assert made.deadline.lead_s == 180, "half of the limit"
        assert made.deadline.seconds_to_save() == pytest.approx(180, abs=5), "a limit that a person has moved"
        queue("scontrol", "update", f"jobid={job}", "timelimit=20")
        made.deadline.refresh()
        # 15 minutes later
        made.deadline.facts = replace(made.deadline.facts, end=time.time() + lead - 1)
        monkeypatch.setattr("launcher.job.attempt.REPEAT_S", 0.2)
        ranks = LocalRanks(Log(tmp_path / "log"), [sys.executable, "-c", RANK], 2, {})
        ended = made.wait(ranks)
        assert [one.code for one in ended] == [75, 75] and made.stop_reason is OutcomeKind.TIME_LIMIT
    finally:
        queue("scancel", str(job))
