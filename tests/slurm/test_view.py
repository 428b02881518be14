"""What status, watch, logs and cancel tell of real jobs: thousands beside them, a purged one, a
controller that is down, Ctrl-C."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import termios
import time

import pytest

from tests.slurm.cluster import Cluster
from tests.support.stub_project import SMALL, Project, wait_until


@pytest.fixture(scope="module")
def own():
    """A cluster of its own, which may be stopped and forgets ended jobs at once."""
    with Cluster(NODES=2, JOB_AGE=2) as cluster:
        yield cluster


@pytest.fixture
def chain(own, tmp_path):
    """A project whose chain is queued on that cluster; sft takes its time."""
    made = Project(tmp_path, own.environment)
    made.behave(sft={"step_s": 0.3})
    queued = made.submit("--set", "sft.iterations=500", profile="dev")
    assert queued.returncode == 0, queued.stdout + queued.stderr
    wait_until(lambda: (made.run / "sft/latest").exists(), 40, "first checkpoint of sft")
    yield made
    made.convoy("cancel", "demo")


def test_status_beside_5000_held_jobs_and_with_the_controller_down(own, chain):
    (chain.folder / "held.sh").write_text("#!/bin/bash\ntrue\n")
    for _ in range(5):  # MaxArraySize is 1001; squeue shows an array that waits as one line
        own.call("sbatch", "--hold", "--array=0-999", "--output=/dev/null", str(chain.folder / "held.sh"))
    try:
        shown = chain.convoy("status", "demo")
        assert shown.returncode == 0 and "waits for sft" in shown.stdout
        own.kill("slurmctld", signal.SIGTERM)
        down = chain.convoy("status", "demo")
        assert (
            down.returncode == 0
            and "Slurm can't be asked: Slurmctld(primary)" in down.stdout
            and "is DOWN" in down.stdout
        )
        assert "as last heard of" in down.stdout
        refused = chain.convoy("cancel", "demo")
        assert (
            refused.returncode == 1
            and "the jobs of sft, reward, rlhf" in refused.stderr
            and "touch runs/demo/STOP" in refused.stderr
        )
    finally:
        own.start()
        own.call("scancel", "--user", str(os.getuid()), "--name", "held.sh")


def test_what_slurm_has_forgotten_is_told_by_the_files_and_resume_chains_it_anew(own, chain):
    said = chain.convoy("cancel", "demo")
    assert "sft was running at iteration" in said.stdout and "reward was pending (waits for sft)" in said.stdout
    wait_until(lambda: not own.call("squeue", "-h", "-t", "all").strip(), 40, "purge of the jobs")
    rows = chain.states()
    assert (rows["sft"]["state"], rows["sft"]["class"]) == ("cancelled", "cancelled") and rows["convert"][
        "state"
    ] == "done"
    assert rows["reward"]["state"] == "cancelled" and "was cancelled with the run" in rows["reward"]["why"]
    chain.behave()
    resumed = chain.convoy("resume", "demo", "--set", "sft.iterations=20", "--yes")
    assert resumed.returncode == 0 and "sft.iterations: 500 -> 20" in resumed.stdout, resumed.stdout + resumed.stderr
    assert [event["stage"] for event in chain.ledger("submitted")][6:] == ["sft", "reward", "rlhf", "export", "mtbench"]
    assert "stopped job" in chain.convoy("cancel", "demo").stdout


def test_cancel_of_a_stage_that_waits_for_its_retry_leaves_nothing(own, chain):
    chain.convoy("cancel", "demo")
    chain.behave(sft={"pause_at": 30, "step_s": 0.05})
    assert chain.convoy("resume", "demo").returncode == 0
    wait_until(lambda: chain.states()["sft"]["state"] == "requeued", 60, "retry in the queue")
    said = chain.convoy("cancel", "demo")
    assert said.returncode == 0 and "sft was requeued" in said.stdout, said.stdout + said.stderr
    assert not own.call("squeue", "-h").strip()
    assert {row["state"] for row in chain.states().values()} == {"done", "cancelled"}


def test_watch_on_a_terminal_follows_its_size_and_ctrl_c_leaves_the_run_alone(own, chain):
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(chain.folder)
        command = chain.command("watch", "demo")
        # a shell may export them; they do not follow the terminal
        os.execvpe(command[0], command, {**chain.environment, "COLUMNS": "80", "LINES": "24"})
    out = b""

    def resize(columns: int) -> None:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def seen(text: bytes, since: int) -> bool:
        nonlocal out
        if select.select([terminal], [], [], 0.05)[0]:
            out += os.read(terminal, 65_536)
        return text in out[since:]

    resize(80)
    wait_until(lambda: seen(b"sft", 0) and b"Ctrl-C leaves" in out, 20, "first picture")
    assert b" bar " not in out and b"waits for sft" in out
    at = len(out)
    resize(160)
    wait_until(lambda: seen(b" bar ", at), 10, "a picture for the wider terminal")
    at = len(out)
    os.write(terminal, b"\x03")
    wait_until(lambda: seen(b"not watching any longer", at), 10, "the end")
    assert b"\x1b[?1049l" in out[at:], "the shell's screen is back"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert chain.states()["sft"]["state"] == "running"


def test_logs_follow_the_run_through_its_stages(own, tmp_path):
    project = Project(tmp_path, own.environment)
    assert project.submit("--until", "sft", profile="dev").returncode == 0
    wait_until(lambda: project.states()["convert"]["state"] in ("running", "done"), 30, "start")
    shown = project.convoy("logs", "demo", "-f")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert any("sft [0] sft rank 0 of 2" in line for line in lines) and any(
        "[launcher] sft done" in line for line in lines
    )
    stamps = [line[:14] for line in project.convoy("logs", "demo", "all").stdout.splitlines()]
    assert stamps == sorted(stamps)


def test_batch_script_that_fails_before_its_stage_begins_is_told_by_its_output(own, tmp_path):
    project = Project(tmp_path, own.environment)
    (tmp_path / "mine.toml").write_text(
        'scheduler = "slurm"\ndevice = "cpu"\npartition = "main"\ngpus_per_node = 2\nmax_nodes = 2\n'
        'setup = ["echo no such module: cuda/99 >&2", "echo see module avail >&2", "false"]\n'
    )
    assert project.submit(profile="mine.toml").returncode == 0
    wait_until(lambda: project.states()["convert"]["state"] not in ("pending", "running"), 30, "end of convert")
    shown, row = project.convoy("status", "demo").stdout, project.states()["convert"]
    assert row["state"] in ("failed", "lost") and ".out ends: see module avail)" in row["why"], row
    assert (
        row["state"] == "lost" or "| no such module: cuda/99" in shown and "setup or container of the profile" in shown
    ), shown
    said = project.convoy("logs", "demo")
    assert said.returncode == 0 and "[slurm] no such module: cuda/99" in said.stdout, said.stderr
    project.convoy("cancel", "demo")


def test_start_estimate_and_reasons_come_from_the_queue(own, tmp_path):
    blocker = own.call(
        "sbatch", "--parsable", "--nodes=2", "--exclusive", "--time=5", "--output=/dev/null", "--wrap", "sleep 60"
    ).strip()
    project = Project(tmp_path, own.environment)
    try:
        assert project.convoy("submit", "full-pipeline", "--name", "demo", "--profile", "dev", *SMALL).returncode == 0

        def decided() -> bool:
            """The estimate may come a moment before the scheduler has named its reason."""
            row = project.states()["convert"]
            return bool(row["starts"]) and row["why"] != "just queued"

        wait_until(decided, 40, "Slurm's estimate and its reason")
        shown = project.convoy("status", "demo").stdout
        assert "may start" in shown and ("nodes it needs are busy" in shown or "higher priority" in shown)
        row = json.loads(project.convoy("status", "demo", "--json").stdout)[0]
        assert 0 < row["starts"] - time.time() <= 330
    finally:
        own.call("scancel", blocker)
        project.convoy("cancel", "demo")
