"""All of a chain is queued or nothing, whoever dies half-way; the same submit twice queues once.
Real Slurm; only the deaths are made."""

import os
import re
import shutil
import signal

import pytest

from tests.slurm.cluster import Cluster
from tests.support.slurm_jobs import ORDER, jobs
from tests.support.stub_project import Project, wait_until

KILL_SUBMITTER = "kill -9 $PPID"
KILL_GUARD_TOO = "kill -9 $(pgrep -P $PPID -f launcher.slurm.transaction) $PPID"


def booby_trap(
    project: Project, program: str, call: int, before: str = "true", after: str = "true", word: str = ""
) -> None:
    """The ``call``-th use of a Slurm command by the submitter (with ``word`` in it) has the shell
    run ``before`` and ``after`` around the real one."""
    folder = project.folder / "bin"
    folder.mkdir(exist_ok=True)
    real = shutil.which(program)
    (folder / program).write_text(f"""#!/bin/bash
case "$*" in *--test-only*) exec {real} "$@" ;; *{word}*) ;; *) exec {real} "$@" ;; esac
if ! tr '\\0' ' ' < /proc/$PPID/cmdline | grep -q ' launcher submit'; then exec {real} "$@"; fi
echo >> {folder}/{program}.calls
if [ "$(wc -l < {folder}/{program}.calls)" != {call} ]; then exec {real} "$@"; fi
{before}
{real} "$@"
code=$?
{after}
exit $code
""")
    (folder / program).chmod(0o755)
    project.environment["PATH"] = f"{folder}:{os.environ['PATH']}"


def alive(queue, project) -> dict[str, list[str]]:
    return {stage: job for stage, job in jobs(queue, project).items() if job[1] in ("PENDING", "RUNNING", "COMPLETING")}


@pytest.mark.parametrize(
    "call, before, after",
    [(1, "true", KILL_SUBMITTER), (4, KILL_SUBMITTER + "; exit 1", "true"), (6, "true", KILL_SUBMITTER)],
    ids=["first", "before-the-4th", "last"],
)
def test_submitter_killed_half_way_leaves_nothing_queued(project, queue, call, before, after):
    booby_trap(project, "sbatch", call, before, after)
    assert project.submit(profile="dev").returncode == -signal.SIGKILL
    wait_until(lambda: project.ledger("withdrawn"), 20, "the guard's withdrawal")
    assert alive(queue, project) == {} and not (project.run / "convert/status.json").exists()
    again = project.submit(profile="dev")
    assert again.returncode == 0 and sorted(alive(queue, project)) == sorted(ORDER), again.stderr


def test_guard_killed_too_then_nothing_runs_and_the_next_command_withdraws(project, queue):
    booby_trap(project, "sbatch", 3, after=KILL_GUARD_TOO)
    assert project.submit(profile="dev").returncode == -signal.SIGKILL
    first = jobs(queue, project)
    assert [first[stage][1] for stage in ORDER[:3]] == ["PENDING"] * 3 and first["convert"][2] == "JobHeldUser"
    again = project.submit(profile="dev")
    assert again.returncode == 0, again.stderr
    assert list(project.ledger("withdrawn")[0]["jobs"]) == ORDER[:3]
    now = alive(queue, project)
    assert sorted(now) == sorted(ORDER) and not {job[0] for job in now.values()} & {job[0] for job in first.values()}


def test_job_whose_sbatch_was_accepted_but_never_answered_is_withdrawn(project, queue):
    booby_trap(project, "sbatch", 3, after="echo 'slurm_receive_msg: timed out' >&2; exit 1")
    refused = project.submit(profile="dev")
    assert refused.returncode == 1 and "timed out" in refused.stderr
    assert alive(queue, project) == {}
    assert list(project.ledger("withdrawn")[0]["jobs"]) == ORDER[:3]


def test_killed_after_the_last_sbatch_before_the_release_the_guard_lets_it_go(project, queue):
    booby_trap(project, "scontrol", 1, before=KILL_SUBMITTER + "; exit 1", word="release")
    assert project.submit("--until", "convert", profile="dev").returncode == -signal.SIGKILL
    wait_until(lambda: project.ledger("queued"), 20, "the guard's release")
    wait_until(lambda: (project.run / "convert/DONE.json").exists(), 30, "the chain")
    assert project.ledger("withdrawn") == [] and len(project.ledger("submitted")) == 1


def test_three_submits_at_once_queue_one_chain(project, queue):
    project.behave(convert={"step_s": 3})
    arguments = project.command("submit", "full-pipeline", "--name", "demo", "--profile", "dev")
    started = [project.start(*arguments[3:]) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum("queued: convert" in text for text in said) == 1 and sum("queued already" in text for text in said) == 2
    identity = project.json("config.json")["run"]["id"]
    lines = queue("squeue", "-h", "-t", "all", "-o", "%k").splitlines()
    assert sum(f"run={identity} " in line for line in lines) == 6 == len(project.ledger("submitted"))


def test_controller_that_dies_between_two_jobs(tmp_path):
    """Stopped in order, so that it keeps its state: one killed within 5 s of an sbatch forgets the
    jobs by itself."""
    with Cluster() as cluster:
        project = Project(tmp_path, cluster.environment)
        booby_trap(project, "sbatch", 3, before=f"kill -TERM {cluster.pid('slurmctld')}; sleep 1")
        failed = project.submit(profile="dev")
        assert failed.returncode == 1 and "withdraws it as soon as Slurm answers" in failed.stderr, failed.stderr
        cluster.start()
        wait_until(lambda: project.ledger("withdrawn"), 40, "the guard's withdrawal")
        assert {line for line in cluster.call("squeue", "-h", "-t", "all", "-o", "%T").splitlines()} == {"CANCELLED"}
        assert list(project.ledger("withdrawn")[0]["jobs"]) == ORDER[:2]
        assert not (project.run / "convert/status.json").exists()


def test_controller_that_is_down_is_named_as_the_cause_and_nothing_is_written(tmp_path):
    with Cluster(NODES=1) as cluster:
        project = Project(tmp_path, cluster.environment)
        cluster.kill("slurmctld", signal.SIGTERM)
        failed = project.submit(profile="dev")
        assert failed.returncode == 1 and "is DOWN): nothing was queued" in failed.stderr, failed.stderr
        assert "would refuse" not in failed.stderr and not project.run.exists()
        shown = project.convoy("plan", "full-pipeline", "--profile", "dev")
        assert shown.returncode == 0 and "start: sbatch is here, but no cluster answers" in shown.stdout, (
            shown.stdout + shown.stderr
        )
        assert "is DOWN); ask again when it does" in project.convoy("doctor").stdout


def test_another_configuration_of_what_is_queued_is_refused(project):
    """The jobs that wait are what they were: neither their resources nor a stage that has not begun
    may change under them."""
    project.behave(convert={"step_s": 5})
    assert project.submit(profile="dev").returncode == 0
    before = (project.run / "config.json").read_bytes()
    for change, line in (("rlhf.lr=0.5", "rlhf.lr: "), ("resources.sft.nodes=2", "resources.sft.nodes: 1 -> 2")):
        refused = project.submit("--set", change, profile="dev")
        assert refused.returncode == 2 and "queued with another configuration" in refused.stderr, (
            refused.stdout + refused.stderr
        )
        assert line in refused.stderr and "launcher cancel runs/demo" in refused.stderr
    assert (project.run / "config.json").read_bytes() == before
    project.convoy("cancel", "demo")


def test_what_slurm_would_refuse_is_said_before_a_run_folder_exists(project):
    refused = project.submit(
        "--set", "resources.sft.cpus_per_gpu=1000", "--set", "resources.rlhf.cpus_per_gpu=1000", profile="dev"
    )
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert refused.stderr.count("Slurm would refuse it:") == 2 and "change resources.sft" in refused.stderr
    assert not project.run.exists()


def test_plan_asks_when_it_could_start(project, tmp_path):
    planned = project.convoy("plan", "full-pipeline", "--name", "demo", "--scripts")
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.count("#!/bin/bash") == 6 and "#SBATCH --job-name=demo-" in planned.stdout
    row = next(line for line in planned.stdout.splitlines() if "convert" in line and "hf_to_megatron" in line)
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", row) and "after sft, reward" in planned.stdout
    assert not project.run.exists()


def test_a_cluster_whose_nodes_are_drained_is_no_mistake(tmp_path):
    """Slurm's answer to --test-only is then the same as to a request that no node fits."""
    with Cluster() as cluster:
        project = Project(tmp_path, cluster.environment)
        cluster.call("scontrol", "update", "nodename=ALL", "state=drain", "reason=service")
        planned = project.convoy("plan", "full-pipeline", "--name", "demo")
        assert planned.returncode == 0 and "4 of 4 nodes are down, drained or reserved" in planned.stdout, (
            planned.stderr
        )
        submitted = project.submit(profile="dev")
        assert submitted.returncode == 0 and len(project.ledger("submitted")) == 6, submitted.stderr


def test_what_slurm_would_refuse_of_a_change_is_said_before_the_run_changes(project):
    assert project.submit("--until", "convert", "--wait", profile="dev").returncode == 0
    before = {path: path.read_bytes() for path in project.run.rglob("*.json*")}
    for arguments in (
        ["--set", "resources.sft.cpus_per_gpu=1000"],
        ["--from", "convert", "--set", "resources.convert.cpus_per_gpu=1000"],
    ):
        refused = project.convoy("resume", "demo", "--all", "--yes", *arguments)
        assert refused.returncode == 2 and "Slurm would refuse it:" in refused.stderr, refused.stdout + refused.stderr
        assert {path: path.read_bytes() for path in project.run.rglob("*.json*")} == before
