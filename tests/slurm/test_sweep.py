"""A sweep as job arrays on a real Slurm: element by element, one folder each, one failing element
stops no other."""

import json

from tests.support.stub_project import SMALL, Project, wait_until

SWEEP = ["submit", "full-pipeline", "--name", "lr", "--until", "reward", "--sweep", "sft.lr=1e-5,2e-5", *SMALL]


def run_of(project: Project, index: int):
    return project.folder / "runs/lr" / str(index)


def comparison(project: Project) -> list[dict]:
    done = project.convoy("status", "lr", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[0]["runs"]


def arrays(queue, project: Project) -> list[str]:
    """Lines "array index state stage" of the sweep's jobs."""
    identity = json.loads((project.folder / "runs/lr/sweep.json").read_text())["id"]
    lines = queue("squeue", "-r", "-h", "-t", "all", "-o", "%F %K %T %j").splitlines()
    return [line.replace(f"{identity}.", "") for line in lines if f"{identity}." in line]


def test_one_array_a_stage_and_each_element_waits_for_its_own_parent_only(project, queue):
    project.behave(sft={"fail_in": "1", "fail_at": 2, "step_s": 0.1})
    submitted = project.convoy(*SWEEP, "--profile", "dev")
    assert submitted.returncode == 0 and "queued: convert " in submitted.stdout, submitted.stdout + submitted.stderr
    assert len({line.split()[0] for line in arrays(queue, project)}) == 3 and len(arrays(queue, project)) == 6
    again = project.convoy(*SWEEP, "--profile", "dev")
    assert "queued already" in again.stdout and len(arrays(queue, project)) == 6
    wait_until(
        lambda: [row["state"] for row in comparison(project)] == ["idle", "failed"], 60, "element 0 done with reward"
    )
    assert [json.loads((run_of(project, at) / "sft/config.json").read_text())["lr"] for at in range(2)] == [1e-5, 2e-5]
    assert [(run_of(project, at) / "reward/DONE.json").exists() for at in range(2)] == [True, False]
    rows = comparison(project)
    assert (
        rows[1]["stage"] == "sft"
        and "loss is nan at iteration 2" in rows[1]["why"]
        and "sft.loss" in rows[0]["numbers"]
    )
    shown = project.convoy("status", "lr").stdout
    assert "runs/lr/1" in shown and "2e-05" in shown
    (project.folder / "mended").touch()
    resumed = project.convoy("resume", "lr", "--all")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    wait_until(lambda: [row["state"] for row in comparison(project)] == ["done"] * 2, 90, "all stages of all elements")
    starts = [json.loads(line) for line in (run_of(project, 0) / "ledger.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "started" and event["stage"] == "sft" for event in starts) == 1, (
        "what is done runs once"
    )


def test_a_requeued_element_comes_back_alone_and_cancel_leaves_nothing(project, queue):
    project.behave(sft={"pause_at": 2, "step_s": 0.1}, reward={"step_s": 5})
    assert project.convoy(*SWEEP, "--profile", "dev").returncode == 0
    wait_until(
        lambda: all((run_of(project, at) / "reward/status.json").exists() for at in range(2)),
        60,
        "every element's second stage",
    )
    for at in range(2):
        events = [json.loads(line) for line in (run_of(project, at) / "ledger.jsonl").read_text().splitlines()]
        assert [event["iteration"] for event in events if event["event"] == "started" and event["stage"] == "sft"] == [
            None,
            2,
        ]
    cancelled = project.convoy("cancel", "lr")
    assert cancelled.returncode == 0, cancelled.stderr
    assert {line.split()[2] for line in arrays(queue, project)} <= {"COMPLETED", "CANCELLED"}


def test_wait_ends_when_nobody_works_any_more_and_fails_where_one_element_did(project):
    project.behave(sft={"fail_in": "0", "fail_at": 2})
    done = project.convoy(*SWEEP, "--profile", "dev", "--wait", timeout=150)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "runs/lr/1: convert, sft, reward done" in done.stdout and "sft failed: " in done.stdout
    again = project.convoy("resume", "lr", "--until", "convert", "--wait")
    assert again.returncode == 0 and "of all runs done: nothing left to do" in again.stdout, again.stdout + again.stderr
