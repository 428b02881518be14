"""What happens to Slurm itself: its controller, its nodes, its memory of jobs, its accounting."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.slurm.cluster import Cluster, missing
from tests.slurm.faults.case import Case, Skipped, scenario

SAVE_WINDOW_S = 6
"""slurmctld writes its state up to 5 s after a change."""


def _sft(case: Case, step_s: float = 0.2, iterations: int = 20, **behaviour) -> None:
    case.project.behave(sft={"step_s": step_s, **behaviour})
    case.submit("--until", "reward", sets={"sft.iterations": iterations})
    case.begun("sft", 2)


@scenario("slurmctld stopped for 5 s while a stage runs", cluster={"NODES": 1}, seconds=30)
def controller_stopped(case: Case) -> str:
    _sft(case, iterations=80)
    case.cluster.kill("slurmctld", signal.SIGTERM)
    case.inject()
    shown = case.project.convoy("status", "demo")
    case.notice(
        lambda: shown.returncode == 0 and "Slurm can't be asked" in shown.stdout,
        0,
        f"status: {shown.stdout}{shown.stderr}",
    )
    time.sleep(max(0, case.injected + 5 - time.monotonic()))
    case.cluster.start()
    case.done("sft", "reward", seconds=90)
    return "status shows the files and says so; the chain goes on: done"


@scenario("slurmctld away while a stage wants to be queued again", cluster={"NODES": 1}, seconds=40)
def controller_away_at_requeue(case: Case) -> str:
    _sft(case, iterations=50, pause_at=45)
    case.begun("sft", 36)  # past the window in which the controller would forget the job
    case.cluster.kill("slurmctld")
    case.inject()
    case.begun("sft", 45)
    time.sleep(4)
    case.cluster.start()
    case.notice(lambda: case.state("sft") == "requeued", 60, "the job waits for the controller, then is queued again")
    case.done("sft", "reward", seconds=60)
    return "the job waited for the controller; queued again: done"


@scenario("slurmctld kill -9 later than its save window, back after 4 s", cluster={"NODES": 1}, seconds=30)
def controller_killed(case: Case) -> str:
    _sft(case, iterations=50)
    time.sleep(SAVE_WINDOW_S)
    case.cluster.kill("slurmctld")
    case.inject()
    time.sleep(4)
    case.cluster.start()
    case.notice(lambda: case.row("sft")["state"] in ("running", "done"), 20, "status knows the job")
    case.done("sft", "reward", seconds=90)
    return "jobs and dependencies are kept: done"


@scenario("slurmctld kill -9 within its save window", cluster={"NODES": 1}, seconds=35)
def controller_forgot(case: Case) -> str:
    """The jobs are gone from the queue, the running one goes on as an orphan, and their ids are
    handed out again."""
    case.project.behave(convert={"step_s": 4})
    case.submit("--until", "reward")
    first = case.job("convert")
    case.until(lambda: case.has("convert/rank_0.json"), 10, "convert runs")
    case.cluster.kill("slurmctld")
    case.inject()
    case.cluster.start()
    stranger = case.cluster.call("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 20").strip()
    case.notice(lambda: case.row("sft")["state"] in ("lost", "pending", "running", "done"), 20, "status answers")
    kept = sorted(stage for stage, state in case.jobs().items() if state not in ("CANCELLED", "FAILED"))
    case.resume()
    # Slurm kills orphans when it hears of them
    case.done("convert", "sft", "reward", seconds=90, again="convert")
    assert case.cluster.call("squeue", "-h", "-t", "all", "-j", stranger, "-o", "%T").strip() in (
        "RUNNING",
        "COMPLETED",
    ), "not ours"
    reused = " (its id went to a stranger's job)" if stranger == first else ""
    return f"queue knew {', '.join(kept) or 'no job'} of 3{reused}; resumed: done"


@scenario("node set down by the administrator", cluster={"NODES": 2}, seconds=30)
def node_down(case: Case) -> str:
    _sft(case)
    node = case.rank("sft", 0)["SLURMD_NODENAME"]
    case.cluster.call("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    case.inject()
    case.notice(lambda: case.project.ledger("requeued"), 30, "the job says that it is queued again")
    case.until(
        lambda: case.has("sft/DONE.json") or "scontrol release" in case.row("sft")["why"],
        60,
        "sft goes on, or Slurm holds it",
    )
    # now and then Slurm can't launch the job again and holds it: status says what to do
    if not case.has("sft/DONE.json"):
        case.cluster.call("scontrol", "release", case.job("sft"))
    case.done("sft", "reward", seconds=90)
    return "requeued by Slurm, went on from its checkpoint: done"


@scenario("slurmd and all it runs killed (node crash)", cluster={"NODES": 2, "NODE_TIMEOUT": 5}, seconds=60)
def node_crashed(case: Case) -> str:
    _sft(case, iterations=30)
    node = case.rank("sft", 0)["SLURMD_NODENAME"]
    case.cluster.kill(f"slurmd.{node}")
    for pid in _processes_of(case):
        os.kill(pid, signal.SIGKILL)
    case.inject()
    case.notice(
        lambda: case.jobs()["sft"] == "PENDING" or case.state("sft") == "requeued",
        60,
        "Slurm sees that the node is gone",
    )
    case.done("sft", "reward", seconds=90)
    assert case.rank("sft", 0)["SLURMD_NODENAME"] != node
    return "requeued by Slurm on another node, went on from its checkpoint: done"


@scenario("slurmd killed, its job's processes live on", cluster={"NODES": 2, "NODE_TIMEOUT": 5}, seconds=60)
def slurmd_killed(case: Case) -> str:
    """The node is down for Slurm, which starts the job elsewhere while the old ranks still
    train."""
    _sft(case, step_s=0.5, iterations=120)
    case.cluster.kill(f"slurmd.{case.rank('sft', 0)['SLURMD_NODENAME']}")
    case.inject()
    case.notice(lambda: case.jobs()["sft"] == "PENDING", 60, "Slurm sees that the node is gone")
    case.done("sft", "reward", seconds=120)
    return "requeued by Slurm; the old ranks save no more once the new attempt has begun: done"


def _processes_of(case: Case) -> list[int]:
    """Pids of the slurmstepds of this cluster and of the processes that work in the project's
    folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, where = (path / "cmdline").read_bytes(), (path / "cwd").resolve()
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        ours = f"SLURM_CONF={case.cluster.environment['SLURM_CONF']}".encode() in environment
        if (where == case.folder and b"SLURM_JOB_ID=" in environment) or (ours and words.startswith(b"slurmstepd")):
            found.append(int(path.name))
    return found


@scenario("failed job purged (MinJobAge)", cluster={"NODES": 1, "JOB_AGE": 2}, seconds=40)
def job_purged(case: Case) -> str:
    return _purged(case)


def _purged(case: Case) -> str:
    case.project.behave(sft={"exit_at": 2, "code": 3})
    case.submit("--until", "reward")
    case.until(lambda: case.state("sft") == "failed", 30, "failure")
    case.inject()
    case.until(lambda: not case.jobs(), 60, "purge")
    row = case.row("sft")
    case.notice(lambda: row["state"] == "failed" and "exit code 3" in row["why"], 0, f"status still knows: {row}")
    case.resume()
    assert [event["after"] for event in case.project.ledger("submitted") if event["stage"] == "sft"][-1] == [], (
        "a stale id as dependency"
    )
    case.done("convert", "sft", "reward")
    return "status still knows the cause; resumed without the old ids: done"


@scenario("accounting off, sacct fails; whole chain")
def accounting_off(case: Case) -> str:
    assert "disabled" in _sacct(case.cluster), "this cluster was to have no accounting"
    case.inject()
    case.submit()
    case.done("convert", "sft", "reward", "rlhf", "export", "mtbench", seconds=90)
    assert {row["state"] for row in case.project.states().values()} == {"done"}
    return "done"


def _sacct(cluster: Cluster) -> str:
    import subprocess

    done = subprocess.run(
        ["sacct", "-X", "-n"], env={**os.environ, **cluster.environment}, capture_output=True, text=True, timeout=60
    )
    return done.stdout + done.stderr


def needs_accounting() -> None:
    if absent := missing("slurmdbd", "mariadbd"):
        raise Skipped(
            f"{' and '.join(absent)} not installed (apt-get install slurmdbd slurm-wlm-mysql-plugin "
            "mariadb-server-core mariadb-client-core)"
        )


@scenario("accounting on; failed job purged", cluster={"NODES": 1, "JOB_AGE": 2, "ACCOUNTING": 1}, seconds=45)
def accounting_on(case: Case) -> str:
    return _purged(case)


@scenario("accounting on but it stops answering", cluster={"NODES": 1, "ACCOUNTING": 1}, seconds=30)
def accounting_lags(case: Case) -> str:
    case.cluster.kill("slurmdbd", signal.SIGSTOP)
    try:
        case.inject()
        case.submit("--until", "reward")
        began = time.monotonic()
        case.row("sft")
        assert time.monotonic() - began < 10, "status waits for the accounting"
        case.done("convert", "sft", "reward")
    finally:
        case.cluster.kill("slurmdbd", signal.SIGCONT)
    return "done; status does not wait for it"
