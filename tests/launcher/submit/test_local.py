"""The local profile with stub stages: order, endings and their causes, resume, cancel. Real
processes, real signals."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from launcher.run import manifest
from launcher.run.folder import process_start
from tests.support.evaluations import evaluate
from tests.support.stub_project import ROOT, SMALL, small, wait_until

ORDER = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]


def test_chain_runs_in_order_and_leaves_manifests(project):
    done = project.submit("--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["stage"] for event in project.ledger("done")] == ORDER
    manifest = project.json("rlhf/DONE.json")
    assert manifest["iteration"] == 3
    assert manifest["parents"] == {stage: project.json(f"{stage}/DONE.json")["identity"] for stage in ("sft", "reward")}
    weights = manifest["outputs"]["rlhf/checkpoints/iter_0000003/policy/weights"]
    assert weights == {"size": 6, "sha256": hashlib.sha256(b"rlhf 3").hexdigest()}
    assert "report.html" in project.json("mtbench/DONE.json")["outputs"]
    assert project.convoy("report", "demo").stdout.strip() == "runs/demo/report.html"
    evaluate(project.folder / "apart")
    both = project.convoy("report", "demo", "apart", "--output", "both")
    assert both.returncode == 0 and "demo, apart" in (project.folder / "both/report.html").read_text(), both.stderr


@pytest.mark.parametrize(
    ("pipeline", "order"),
    [
        ("dpo", ["convert", "sft", "dpo", "export", "mtbench"]),
        ("grpo", ["convert", "sft", "reward", "grpo", "export", "mtbench"]),
    ],
)
def test_another_pipeline_is_another_graph(project, pipeline, order):
    """From submit to resume a run knows the stages of its own pipeline only, without being told
    again which it is."""
    command = ["submit", "full-pipeline", "--name", "demo", "--profile", "local", "--wait", *small(*order[1:-2])]
    done = project.convoy(*command, "--pipeline", pipeline)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["stage"] for event in project.ledger("done")] == order == list(project.states())
    assert list(project.json("mtbench/config.json")["paths"]["models"]) == ["sft", pipeline]
    assert project.convoy(*command).returncode == 0 and len(project.ledger("started")) == len(order)
    again = project.convoy("resume", "demo", "--from", pipeline, "--wait")
    assert again.returncode == 0 and [event["stage"] for event in project.ledger("started")][len(order) :] == [
        pipeline,
        "export",
        "mtbench",
    ]
    for arguments, words in (
        (["resume", "demo", "--from", "rlhf"], f"has no stage rlhf: its pipeline is {pipeline} (convert -> sft"),
        ([*command, "--pipeline", "ppo"], f"--pipeline {pipeline}; give ppo its own run with --name"),
        ([*command, "--set", "rlhf.lr=1"], f"--set rlhf.lr=1: pipeline {pipeline} has no stage rlhf"),
        ([*command, "--until", "rlhf"], "rlhf is no stage of this pipeline"),
        (["submit", "rlhf", "--name", "demo"], "it is one of --pipeline ppo, in a run of its own"),
    ):
        refused = project.convoy(*arguments)
        assert refused.returncode == 2 and words in " ".join(refused.stderr.split()), refused.stderr


def test_ranks_get_the_five_variables_and_their_lines_are_tagged(project):
    project.submit("--wait", "--until", "sft")
    ranks = [project.json(f"sft/rank_{rank}.json") for rank in (0, 1)]
    assert [(rank["RANK"], rank["LOCAL_RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert ranks[0]["MASTER_ADDR"] == "127.0.0.1" and ranks[0]["MASTER_PORT"] == ranks[1]["MASTER_PORT"]
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}"
    assert all(
        re.search(rf"^{stamp} \[{rank}\] sft rank {rank} of 2$", project.log("sft"), re.MULTILINE) for rank in (0, 1)
    )


def test_same_submit_twice_starts_nothing_twice(project):
    project.submit("--wait")
    again = project.submit("--wait")
    assert again.returncode == 0 and "nothing left to do" in again.stdout
    assert len(project.ledger("started")) == len(ORDER)
    assert (project.folder / "prepared").read_text() == "once\n"


def test_submit_goes_on_with_what_is_left(project):
    assert project.submit("--wait", "--until", "sft").returncode == 0
    assert project.submit("--wait").returncode == 0
    assert [event["stage"] for event in project.ledger("started")] == ORDER


def test_other_configuration_under_the_same_name_is_refused_with_the_keys(project):
    project.submit("--wait", "--until", "sft")
    other = project.submit("--set", "sft.lr=0.5", "--wait")
    assert other.returncode == 2
    assert "sft.lr: 0.003 -> 0.5" in other.stderr and "--name" in other.stderr and "resume" in other.stderr


def test_single_stage_needs_its_parents(project):
    refused = project.submit("--wait", target="rlhf")
    assert refused.returncode == 2 and "sft and reward" in refused.stderr and "--until rlhf" in refused.stderr
    assert not project.run.exists()
    project.submit("--wait", "--until", "reward")
    assert project.submit("--wait", target="rlhf").returncode == 0
    assert project.states()["rlhf"]["state"] == "done"


def test_bad_data_is_a_usage_error_and_can_be_mended_under_the_same_name(project):
    (project.folder / "bad_data").touch()
    refused = project.submit("--wait")
    assert refused.returncode == 2 and "line 7: field prompt is missing" in refused.stderr
    (project.folder / "bad_data").unlink()
    (project.folder / "no_reward").touch()  # a source of chat messages, say
    refused = project.submit("--wait")
    assert refused.returncode == 2 and "gives reward.jsonl, which the reward stage reads, no row" in refused.stderr
    assert "nothing reads field 'answer'" in refused.stderr
    assert project.submit("--wait", "--set", "data.seed=5", "--until", "convert").returncode == 0


def test_first_failing_rank_is_the_cause_and_the_chain_stops(project):
    project.behave(sft={"fail_at": 2, "rank": 1, "step_s": 0.3})
    failed = project.submit("--wait")
    assert failed.returncode == 1
    assert "rank 1: exit code 1: RuntimeError: loss is nan at iteration 2" in failed.stdout
    assert "runs/demo/sft/logs/attempt_1.log" in failed.stdout
    states = project.states()
    assert states["sft"]["state"] == "failed" and states["reward"]["state"] == "not submitted"
    partial = project.convoy("report", "demo")
    assert "not finished: sft is failed" in partial.stderr and (project.run / "report.html").exists()
    pid = project.json("sft/rank_0.json")["pid"]
    assert process_start(pid) is None, "the other rank must not live on"


def test_killed_rank_then_resume_goes_on_without_running_done_stages_again(project):
    project.behave(rlhf={"step_s": 0.3})
    running = project.start(
        "submit",
        "full-pipeline",
        "--name",
        "demo",
        "--profile",
        "local",
        "--wait",
        "--set",
        "rlhf.iterations=8",
        "--set",
        "rlhf.warmup_iterations=0",
    )
    wait_until(lambda: (project.run / "rlhf/latest").exists(), 90, "first checkpoint of rlhf")
    os.kill(project.json("rlhf/rank_1.json")["pid"], signal.SIGKILL)
    output, _ = running.communicate(timeout=30)
    assert running.returncode == 1 and "rank 1: killed by SIGKILL" in output
    saved = int((project.run / "rlhf/latest").read_text())
    assert 1 <= saved < 8
    assert project.convoy("resume", "demo", "--wait").returncode == 0
    assert [event["stage"] for event in project.ledger("started")] == [*ORDER[:4], *ORDER[3:]]
    assert [event["iteration"] for event in project.ledger("started") if event["stage"] == "rlhf"] == [None, saved]


def test_exit_75_with_progress_starts_again(project):
    """Its kernels are kept in the run folder, one for all ranks, attempts and stages, but where the
    site has a place of its own."""
    site = 'scheduler = "local"\ndevice = "cpu"\nenvironment = { TRITON_CACHE_DIR = "/site/triton" }\n'
    (project.folder / "site.toml").write_text(site)
    project.behave(sft={"pause_at": 2})
    assert project.submit("--wait", "--until", "sft", profile="site.toml").returncode == 0
    assert [event["iteration"] for event in project.ledger("requeued")] == [2]
    assert project.json("sft/DONE.json")["attempt"] == 2
    for ranks in ("convert/rank_0.json", "sft/rank_0.json", "sft/rank_1.json"):
        assert project.json(ranks)["TORCHINDUCTOR_CACHE_DIR"] == str(project.run.absolute() / "compiled/inductor")
        assert project.json(ranks)["TRITON_CACHE_DIR"] == "/site/triton"


def test_two_attempts_without_progress_fail(project):
    project.behave(sft={"stuck": True})
    failed = project.submit("--wait")
    assert failed.returncode == 1 and "no progress: two attempts ended before a first checkpoint" in failed.stdout
    assert len(project.ledger("started")) == 3  # convert and two attempts of sft
    status = project.json("sft/status.json")
    assert status["class"] == "no progress" and f"\n  do: {status['advice']}\n  log: " in failed.stdout


@pytest.mark.parametrize(
    "behaviour, cause", [({"omit": True}, "saved no checkpoint"), ({"exit": 64}, "exit code 64: error: told to end")]
)
def test_exit_without_output_fails_and_names_it(project, behaviour, cause):
    project.behave(sft=behaviour)
    failed = project.submit("--wait")
    assert failed.returncode == 1 and cause in failed.stdout


def test_a_health_gate_s_pause_waits_for_a_person(project):
    """Exit 76: shown with its cause and what to do, never queued again by itself; resume goes on
    from the checkpoint."""
    project.behave(sft={"exit_at": 3, "code": 76})
    failed = project.submit("--wait", "--until", "sft")
    status = project.json("sft/status.json")
    assert failed.returncode == 1 and (status["state"], status["class"], status["attempt"]) == (
        "failed",
        "health gate",
        1,
    )
    assert "sft paused: " in failed.stdout and "exit code 76" in failed.stdout
    assert "resume goes on from the last checkpoint" in status["advice"]
    assert status["iteration"] and project.convoy("resume", "demo", "--wait").returncode == 0
    assert project.json("sft/status.json")["attempt"] == 2


def test_trainer_at_iteration_0_fails(project):
    project.behave(sft={"omit": True})
    (project.run / "sft/checkpoints/iter_0000000/model").mkdir(parents=True)
    (project.run / "sft/checkpoints/iter_0000000/model/weights").touch()
    (project.run / "sft/latest").write_text("0\n")
    failed = project.submit("--wait")
    assert "iteration 0: it trained nothing" in failed.stdout


def test_missing_export_is_named(project):
    project.behave(export={"omit": True})
    failed = project.submit("--wait")
    assert "runs/demo/export/sft/config.json is missing" in failed.stdout


WEIGHTS = "sft/checkpoints/iter_0000003/model/weights"


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda run: (run / WEIGHTS).write_text("sft"), "has 3 bytes, its manifest says 5: truncated"),
        (lambda run: (run / WEIGHTS).write_text("sft 4"), "does not have the sha256"),
        (lambda run: (run / WEIGHTS).unlink(), "is missing"),
        (lambda run: (run / "sft/config.json").write_text("{}"), "another config.json"),
    ],
)
def test_child_refuses_a_harmed_parent_before_its_ranks_start(project, harm, reason):
    project.submit("--wait", "--until", "sft")
    harm(project.run)
    refused = subprocess.run(
        [sys.executable, "-m", "launcher.job.supervise", "runs/demo", "reward"],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1 and reason in refused.stdout
    assert project.states()["reward"]["state"] == "failed"
    assert not (project.run / "reward/rank_0.json").exists()


def test_parent_without_manifest_is_refused_by_name(project):
    project.submit("--wait", "--until", "sft")
    (project.run / "sft/DONE.json").unlink()
    refused = project.submit("--wait", target="reward")
    assert refused.returncode == 2 and "sft, not DONE" in refused.stderr


def test_a_stage_built_from_a_parent_that_changed_runs_again_from_nothing(project):
    project.submit("--wait")
    resumed = project.convoy("resume", "demo", "--from", "sft", "--load-iteration", "2", "--wait")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    started = [(event["stage"], event["iteration"]) for event in project.ledger("started")][len(ORDER) :]
    assert started == [("sft", 2), ("reward", None), ("rlhf", None), ("export", None), ("mtbench", None)]
    assert (project.run / "sft/DONE.json.1").exists() and (project.run / "rlhf.1/DONE.json").exists()
    assert (project.run / "sft/checkpoints.aside/iter_0000003").is_dir(), "nothing is deleted"


def test_resume_of_an_absent_iteration_lists_those_present(project):
    project.submit("--wait", "--until", "sft")
    refused = project.convoy("resume", "demo", "--from", "sft", "--load-iteration", "7")
    assert refused.returncode == 2 and "present: 1, 2, 3" in refused.stderr
    assert (project.run / "sft/DONE.json").exists()


def test_ctrl_c_saves_and_leaves_no_process(project):
    project.behave(sft={"step_s": 0.2})
    running = project.start(
        "submit", "full-pipeline", "--name", "demo", "--profile", "local", "--wait", "--set", "sft.iterations=500"
    )
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 130 and "stopped" in output
    assert project.states()["sft"]["state"] == "cancelled"
    assert [process_start(project.json(f"sft/rank_{rank}.json")["pid"]) for rank in (0, 1)] == [None, None]


def test_background_run_is_seen_and_cancelled_and_a_second_runner_refused(project):
    project.behave(sft={"step_s": 0.2})
    submit = ("submit", "full-pipeline", "--name", "demo", "--profile", "local", "--set", "sft.iterations=500")
    started = project.convoy(*submit)
    assert started.returncode == 0 and "background" in started.stdout
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    states = project.states()
    assert (states["sft"]["state"], states["reward"]["state"], states["reward"]["why"]) == (
        "running",
        "pending",
        "waits for sft",
    )
    assert states["sft"]["total"] == 500
    assert "nothing new is started" in project.convoy(*submit).stdout
    assert project.convoy("cancel", "demo").returncode == 0
    assert project.states()["sft"]["state"] == "cancelled"
    assert len(project.ledger("runner")) == 1
    assert "[0] sft rank 0 of 2" in project.convoy("logs", "demo").stdout


def test_kill_9_of_the_supervisor_takes_its_ranks_along_and_status_says_so(project):
    project.behave(sft={"step_s": 0.2})
    running = project.start(
        "submit", "full-pipeline", "--name", "demo", "--profile", "local", "--wait", "--set", "sft.iterations=500"
    )
    wait_until(lambda: (project.run / "sft/latest").exists(), 30, "first checkpoint")
    os.kill(project.json("sft/status.json")["pid"], signal.SIGKILL)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 1 and "without a last word" in output
    pids = [project.json(f"sft/rank_{rank}.json")["pid"] for rank in (0, 1)]
    wait_until(lambda: all(process_start(pid) is None for pid in pids), 5, "the ranks' end")
    saved = int((project.run / "sft/latest").read_text())
    project.behave(sft={"exit": 64})  # the next attempt ends at once
    assert project.convoy("resume", "demo", "--wait").returncode
    (end,) = project.ledger("vanished")
    assert (end["attempt"], end["class"], end["iteration"]) == (
        1,
        "killed",
        saved,
    ) and "its supervisor was killed" in end["cause"]
    assert project.ledger("requeued") == [], "nothing queued it again"


def test_a_judge_that_is_away_is_no_lost_rank(project):
    """The stage says so itself: it is not queued again, and the advice is the judge's."""
    refused = "http://127.0.0.1:9/v1: <urlopen error [Errno 111] Connection refused>; gave up after 6 attempts"
    project.behave(mtbench={"words": ["judge", refused]})
    failed = project.submit("--wait")
    row = project.states()["mtbench"]
    assert failed.returncode == 1 and (row["state"], row["class"], row["attempt"]) == ("failed", "judge", 1)
    assert refused in row["why"] and "mtbench.judge_url" in row["advice"]


def test_a_half_written_ledger_line_is_passed_over(project):
    project.submit("--wait", "--until", "convert")
    with open(project.run / "ledger.jsonl", "a") as file:
        file.write('{"time": 1, "event": "do')
    assert project.states()["convert"]["state"] == "done"


def test_dry_run_writes_nothing(project):
    shown = project.submit("--dry-run")
    assert shown.returncode == 0 and "GPU-hours" in shown.stdout
    assert not (project.folder / "runs").exists()


def test_config_of_each_stage_is_its_dataclass_with_paths(project):
    project.submit("--wait", "--until", "convert")
    rlhf = project.json("rlhf/config.json")
    assert rlhf["paths"] == {
        "output": "runs/demo/rlhf",
        "model": "runs/demo/model",
        "init": "runs/demo/sft",
        "reward": "runs/demo/reward",
        "reward_iteration": 0,
        "train": "runs/demo/data/rlhf.jsonl",
        "heldout": "runs/demo/data/heldout.jsonl",
    }
    assert json.loads((project.run / "config.json").read_text())["sft"]["iterations"] == 3


def test_a_manifest_names_the_commit_of_a_checkout_and_no_other(tmp_path):
    if (ROOT / ".git").exists():
        head = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        assert manifest.commit(ROOT).get("commit", "").removesuffix("-dirty") == head
    assert manifest.commit(tmp_path) == {} == manifest.commit(ROOT / "launcher")


FULL_DISK = """
mount -t tmpfs -o size=24m none runs || exit 77
"$0" -m launcher submit full-pipeline --name demo --profile local --wait --until sft "$@" > told 2>&1
"$0" -m launcher status demo > shown 2>&1; "$0" -m launcher status demo --json > states.json
rm runs/demo/sft/fill; echo '{}' > behaviour.json
"$0" -m launcher resume demo --wait > resumed 2>&1; echo $? > code
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_disk_that_is_full_to_the_last_byte_is_named(project):
    """The last words find room in what was kept for them; after making room resume goes on."""
    project.behave(sft={"fill_at": 2})
    (project.folder / "runs").mkdir(exist_ok=True)
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL_DISK, sys.executable, *SMALL],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"no mount here: {done.stderr}")
    row = next(row for row in json.loads((project.folder / "states.json").read_text()) if row["stage"] == "sft")
    assert (row["state"], row["class"]) == ("failed", "disk full"), row
    assert "No space left on device" in row["why"] and "sft.keep_checkpoints" in row["advice"]
    assert "No space left on device" in (project.folder / "told").read_text()
    assert (project.folder / "code").read_text() == "0\n", (project.folder / "resumed").read_text()


def test_a_supervisor_that_breaks_says_how(project):
    """A folder where a file must be: its own traceback's last line is the cause."""
    assert project.submit("--wait", "--until", "convert").returncode == 0
    (project.run / "sft/.attempt").mkdir()
    failed = project.convoy("resume", "demo", "--all", "--wait")
    row = project.states()["sft"]
    assert failed.returncode == 1 and row["state"] == "failed"
    assert "the supervisor: IsADirectoryError: " in row["why"] and "sft/logs/supervise.log" in row["why"]
