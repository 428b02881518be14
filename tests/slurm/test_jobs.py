"""Chains of stub stages on a real Slurm: order, endings, requeue, resume, jobs by hand. Nothing
here is a mock."""

import json
import subprocess
import sys

import pytest

from tests.support.slurm_jobs import ORDER, jobs
from tests.support.stub_project import ROOT, wait_until


def submit(project, *arguments):
    done = project.submit(*arguments, profile="dev")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_chain_of_six_jobs_runs_by_afterok(project, queue):
    project.behave(convert={"step_s": 2})
    submit(project, "--set", "resources.rlhf.nodes=2")
    queued = jobs(queue, project)
    assert list(sorted(queued, key=ORDER.index)) == ORDER
    assert queued["rlhf"][1:3] == ["PENDING", "Dependency"]
    assert {part.split("(")[0] for part in queued["rlhf"][3].split(",")} == {
        f"afterok:{queued[parent][0]}" for parent in ("sft", "reward")
    }
    waited = submit(project, "--set", "resources.rlhf.nodes=2", "--wait")
    assert "queued already" in waited.stdout
    assert [event["stage"] for event in project.ledger("done")] == ORDER
    assert len(project.ledger("submitted")) == len(ORDER)
    ranks = [project.json(f"rlhf/rank_{rank}.json") for rank in range(4)]
    assert {rank["SLURMD_NODENAME"] for rank in ranks} == {"127.0.1.1", "127.0.1.2"}
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    job = int(queued["rlhf"][0])
    shared = ("MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    assert {tuple(rank[name] for name in shared) for rank in ranks} == {("127.0.1.1", str(20000 + job), "")}
    assert "[3] rlhf rank 3 of 4" in project.log("rlhf")


def test_status_says_why_a_stage_was_queued_again(project, queue):
    """While it waits, and while the next attempt runs; as text, as JSON and on one line among all
    runs."""
    project.behave(sft={"step_s": 0.3})
    submit(project, "--until", "sft", "--set", "sft.iterations=60")
    latest = project.run / "sft/latest"
    wait_until(lambda: latest.exists() and int(latest.read_text()) > 1, 60, "steps")
    queue("scancel", "--batch", "--signal=USR1", jobs(queue, project)["sft"][0])
    wait_until(lambda: project.states()["sft"]["state"] == "requeued", 30, "requeue")
    saved = project.ledger("requeued")[0]["iteration"]
    cause = f"reached its time limit; saved iteration {saved}"
    words = f"attempt 1 (time limit): {cause}"
    for state in ("requeued", "running"):
        wait_until(lambda wanted=state: project.states()["sft"]["state"] == wanted, 60, state)
        row = project.states()["sft"]
        assert {**row["previous"], "time": 0} == {
            "attempt": 1,
            "class": "time limit",
            "cause": cause,
            "iteration": saved,
            "time": 0,
        }
        assert words in " ".join(project.convoy("status", "demo").stdout.split()), state
        assert words in project.convoy("status").stdout
    project.convoy("cancel", "demo")


def test_failing_stage_cancels_its_children_and_resume_chains_only_what_is_left(project, queue):
    project.behave(sft={"fail_at": 2, "rank": 1, "step_s": 0.2})
    submit(project)
    wait_until(lambda: jobs(queue, project)["mtbench"][1] == "CANCELLED", 30, "end of the last child")
    states = project.states()
    assert states["sft"]["state"] == "failed"
    assert "rank 1: exit code 1: RuntimeError: loss is nan at iteration 2" in states["sft"]["why"]
    assert states["reward"]["state"] == "cancelled" and "sft did not finish" in states["reward"]["why"]
    assert not (project.run / "reward/rank_0.json").exists()
    (project.folder / "mended").touch()
    resumed = project.convoy("resume", "demo", "--wait", timeout=90)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    again = project.ledger("submitted")[len(ORDER) :]
    assert [event["stage"] for event in again] == ORDER[1:]
    assert again[0]["after"] == [], "convert is DONE: no dependency on its old job"
    assert [event["stage"] for event in project.ledger("started")].count("convert") == 1


def test_resume_right_after_a_failure_replaces_children_that_slurm_has_not_cancelled_yet(project, queue):
    project.behave(sft={"exit": 3})
    submit(project)
    wait_until(
        lambda: (project.run / "sft/status.json").exists() and project.json("sft/status.json")["state"] == "failed",
        30,
        "failure",
    )
    project.behave()
    resumed = project.convoy("resume", "demo", "--wait", timeout=90)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr


def test_exit_75_requeues_the_same_job_and_children_keep_waiting(project, queue):
    project.behave(sft={"pause_at": 2})
    submit(project, "--until", "reward")
    wait_until(lambda: project.ledger("requeued"), 30, "requeue")
    wait_until(lambda: jobs(queue, project)["sft"][1] == "PENDING", 10, "back in the queue")
    assert project.states()["sft"]["state"] == "requeued"
    wait_until(lambda: project.states()["reward"]["state"] == "done", 60, "end of the chain")
    starts = [event for event in project.ledger("started") if event["stage"] == "sft"]
    assert [(event["attempt"], event["iteration"]) for event in starts] == [(1, None), (2, 2)]
    assert starts[0]["job"] == starts[1]["job"]


def test_usr1_ahead_of_the_time_limit_saves_and_requeues(project, queue):
    project.behave(sft={"step_s": 0.3})
    submit(project, "--until", "sft", "--set", "sft.iterations=12")
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    queue("scancel", "--batch", "--signal=USR1", jobs(queue, project)["sft"][0])
    wait_until(lambda: project.states()["sft"]["state"] == "done", 60, "end")
    saved = project.ledger("requeued")[0]["iteration"]
    assert [event["iteration"] for event in project.ledger("started") if event["stage"] == "sft"] == [None, saved]


def test_scancel_by_hand_does_not_come_back(project, queue):
    project.behave(sft={"step_s": 0.3})
    submit(project, "--set", "sft.iterations=500")
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    queue("scancel", jobs(queue, project)["sft"][0])
    wait_until(lambda: project.states()["sft"]["state"] == "cancelled", 20, "cancelled")
    wait_until(lambda: jobs(queue, project)["sft"][1] == "CANCELLED", 20, "job gone")
    states = project.states()
    assert "SIGTERM" in states["sft"]["why"] and states["reward"]["state"] == "cancelled"


def test_cancel_leaves_nothing_in_the_queue(project, queue):
    project.behave(convert={"step_s": 30})
    submit(project)
    wait_until(lambda: project.states()["convert"]["state"] == "running", 20, "start")
    assert project.convoy("cancel", "demo").returncode == 0
    assert {state for _, state, _, _ in jobs(queue, project).values()} == {"CANCELLED"}
    states = project.states()
    assert {row["state"] for row in states.values()} == {"cancelled"}, [row["why"] for row in states.values()]


def test_purged_id_is_never_a_dependency(project, queue):
    """To Slurm an unknown id is a satisfied dependency: a child of a failed, purged parent would
    run."""
    submit(project, "--until", "convert")
    wait_until(lambda: project.states()["convert"]["state"] == "done", 30, "convert")
    # a job that failed long ago, or whose controller lost it
    with open(project.run / "ledger.jsonl", "a") as file:
        file.write(json.dumps({"time": 1, "event": "submitted", "stage": "sft", "job": 999999, "after": []}) + "\n")
    assert project.states()["sft"]["state"] == "lost"
    refused = project.submit(target="reward", profile="dev")
    assert refused.returncode == 2 and "sft, not DONE" in refused.stderr
    assert project.convoy("resume", "demo", "--all").returncode == 0
    made = project.ledger("submitted")[2:]
    assert [event["stage"] for event in made] == ORDER[1:]
    assert 999999 not in [number for event in made for number in event["after"]]
    assert made[0]["after"] == [] and made[1]["after"] == [made[0]["job"]]


def test_more_nodes_than_slurm_has_is_refused_before_anything_is_queued(project, queue):
    """The profile's own limit is raised, so that only Slurm knows; what happens half-way is in
    test_submission.py."""
    profile = project.folder / "wide.toml"
    text = (ROOT / "slurm/clusters/dev.toml").read_text()
    profile.write_text(text.replace("max_nodes = 4", "max_nodes = 400"))
    refused = project.submit(
        "--set",
        "resources.rlhf.nodes=300",
        "--set",
        "rlhf.global_batch_size=9600",
        "--set",
        "rlhf.rollout_batch_size=9600",
        profile=str(profile),
    )
    assert refused.returncode == 2, refused.stderr
    assert "rlhf: Slurm would refuse it: " in refused.stderr and "300 nodes x 2 GPUs" in refused.stderr
    assert not project.run.exists()


def test_committed_script_runs_by_hand_and_status_finds_its_job(project, queue):
    assert project.submit("--wait", "--until", "reward").returncode == 0
    project.behave(rlhf={"step_s": 0.5})
    environment = {**project.environment, "RUN": "runs/demo", "CONVOY_PYTHON": sys.executable}
    done = subprocess.run(
        ["sbatch", "--parsable", str(ROOT / "slurm/rlhf.sbatch")],
        cwd=project.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wait_until(lambda: project.states()["rlhf"]["state"] == "running", 20, "start")
    assert project.states()["rlhf"]["job"] == int(done.stdout)
    assert jobs(queue, project)["rlhf"][0] == done.stdout.strip()
    wait_until(lambda: project.states()["rlhf"]["state"] == "done", 30, "end")
    assert project.json("rlhf/rank_1.json")["WORLD_SIZE"] == "2", "the run's own resources, not the script's 8 ranks"


def test_by_hand_with_too_few_nodes_says_how_many(project, queue):
    assert project.submit("--wait", "--until", "reward", "--set", "resources.rlhf.nodes=2").returncode == 0
    environment = {**project.environment, "RUN": "runs/demo", "CONVOY_PYTHON": sys.executable}
    subprocess.run(
        ["sbatch", str(ROOT / "slurm/rlhf.sbatch")],
        cwd=project.folder,
        env=environment,
        capture_output=True,
        check=True,
    )
    wait_until(lambda: project.states()["rlhf"]["state"] == "failed", 20, "refusal")
    assert (
        "has 1 node(s), the run's resources ask for 2: sbatch --nodes=2 --gpus-per-node=2"
        in project.states()["rlhf"]["why"]
    )


def test_task_gets_the_cores_that_were_asked_for(project, queue):
    submit(project, "--until", "sft", "--set", "resources.sft.cpus_per_gpu=3")
    wait_until(lambda: project.states()["sft"]["state"] == "done", 40, "sft")
    assert project.json("sft/rank_1.json")["SLURM_CPUS_PER_TASK"] == "3"


@pytest.mark.parametrize("value", ["it's", 'say "x"', "$(touch injected)"])
def test_odd_values_reach_slurm_as_they_are(queue, tmp_path, value):
    from launcher.config.sections import Profile, Resources
    from launcher.slurm.script import JobRequest, script

    request = JobRequest(
        name=value,
        comment=value,
        command="true",
        output=str(tmp_path / "out"),
        resources=Resources(gpus_per_node=0),
        profile=Profile(name="test", scheduler="slurm"),
    )
    (tmp_path / "x.sbatch").write_text(script(request))
    number = queue("sbatch", "--parsable", f"--chdir={tmp_path}", str(tmp_path / "x.sbatch")).strip()
    wait_until(lambda: queue("squeue", "-h", "-t", "all", "-j", number, "-o", "%T").strip() == "COMPLETED", 20, "end")
    assert queue("squeue", "-h", "-t", "all", "-j", number, "-o", "%k|%j").strip() == f"{value}|{value}"
    assert not (tmp_path / "injected").exists()


def test_default_profile_is_dev_on_the_dev_cluster(project):
    planned = project.convoy("plan", "full-pipeline")
    assert "profile dev: SLURM_CONF is the cluster of slurm/dev/up" in planned.stdout


def test_status_with_the_controller_out_of_reach_shows_the_files(project, queue):
    submit(project, "--until", "convert")
    wait_until(lambda: project.states()["convert"]["state"] == "done", 30, "convert")
    project.environment["SLURM_CONF"] = str(project.folder / "absent.conf")
    shown = project.convoy("status", "demo")
    assert shown.returncode == 0 and "Slurm can't be asked" in shown.stdout and "done" in shown.stdout
