"""What a shell, a site's settings and a site's wrappers put round sbatch and srun."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal

from tests.slurm.faults.case import Case, scenario
from tests.support.stub_project import wait_until

RANKS = {
    "RANK": "3",
    "WORLD_SIZE": "7",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "gone",
    "MASTER_PORT": "29999",
    "TORCHELASTIC_RUN_ID": "none",
}
OPTIONS = {
    "SBATCH_PARTITION": "low",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_NO_REQUEUE": "1",
    "SBATCH_WAIT": "1",
    "SBATCH_ARRAY_INX": "0-2",
    "SBATCH_JOB_NAME": "mine",
    "SBATCH_SIGNAL": "9@5",
    "SBATCH_OUTPUT": "/dev/null",
    "SLURM_CLUSTERS": "elsewhere",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_STATES": "RUNNING",
    "SLURM_TIME_FORMAT": "relative",
}
HANGS = '[ "$SLURMD_NODENAME" != 127.0.1.2 ] || { stepd=$(ps -o ppid= -p $PPID); echo $stepd > stepd; kill -STOP $stepd; sleep 99; }'


def _job(case: Case, stage: str) -> str:
    return case.cluster.call("scontrol", "show", "job", case.job(stage))


@scenario("SBATCH_*, SQUEUE_*, WORLD_SIZE and PYTHONOPTIMIZE in the shell that submits", seconds=15)
def shell_variables(case: Case) -> str:
    case.project.environment.update(OPTIONS | RANKS | {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error"})
    case.inject()
    case.submit("--until", "sft")
    words = _job(case, "sft")
    assert all(word in words for word in ("Partition=main", "Requeue=1", "JobName=demo-")), words
    assert "TimeLimit=00:01:00" not in words and "ArrayJobId" not in words, words
    case.done("convert", "sft")
    assert case.rank("sft", 1)["WORLD_SIZE"] == "2"
    return "none of it reaches Slurm or a rank: done"


@scenario("SBATCH_EXPORT=NONE and SLURM_EXPORT_ENV=NONE in the shell; whole chain", seconds=20)
def export_none(case: Case) -> str:
    case.project.environment.update({"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE"})
    case.inject()
    case.submit(profile=case.profile(setup='["export SLURM_EXPORT_ENV=NONE SLURM_WAIT=1"]'))
    case.done("convert", "sft", "reward", "rlhf", "export", "mtbench", seconds=90)
    assert not case.project.ledger("bad node"), "a good node was blamed"
    return "srun passes the job's own environment on: done"


@scenario("WaitTime of the site shorter than what rank 0 does alone", cluster={"NODES": 1, "WAIT_TIME": 2}, seconds=25)
def wait_time(case: Case) -> str:
    case.project.behave(sft={"late_s": 6})
    case.inject()
    case.submit("--until", "reward")
    case.done("convert", "sft", "reward")
    assert len([row for row in case.project.ledger("started") if row["stage"] == "sft"]) == 1
    return "srun waits for rank 0: done"


@scenario("a node hangs in the preflight (SIGSTOP of its slurmstepd)", cluster={"NODES": 3}, seconds=70)
def preflight_hangs(case: Case) -> str:
    profile = case.profile(node_check=f"'''{HANGS}'''", preflight_s="24", max_nodes="3")
    stepd = case.folder / "stepd"
    try:
        case.submit("--until", "reward", profile=profile, sets={"resources.sft.nodes": 2, "resources.sft.spares": 1})
        wait_until(stepd.exists, 60, "the node hangs")
        case.inject()
        case.notice(lambda: case.project.ledger("bad node"), 60, "the node is named")
        case.done("convert", "sft", seconds=30)
        # the site reboots it: until then Slurm calls the job completing
        os.kill(int(stepd.read_text()), signal.SIGKILL)
        case.cluster.call("scontrol", "update", "nodename=127.0.1.2", "state=drain", "reason=hung")
        case.done("reward", "sft", "convert", seconds=60)
    finally:
        if stepd.exists():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(stepd.read_text()), signal.SIGKILL)
    event = case.project.ledger("bad node")[0]
    assert (event["node"], event["reason"]) == ("127.0.1.2", "did not answer within 24 s"), event
    nodes = {case.rank("sft", rank)["SLURMD_NODENAME"] for rank in range(4)}
    assert nodes == {"127.0.1.1", "127.0.1.3"}, nodes
    return "named; the ranks start on the good nodes at once: done"


@scenario("the check of the nodes can't run at all", seconds=10)
def check_fails(case: Case) -> str:
    """srun can't start our program, on whichever node: no node is excluded, and nothing waits for
    ever."""
    _wrap(case, "srun", 'echo "slurmstepd: error: execve(): python: No such file or directory" >&2; exit 2')
    case.inject()
    case.submit("--until", "sft")
    cause = case.fails("convert", "the check of the nodes itself failed", "execve()")
    assert not case.project.ledger("bad node") and not case.project.ledger("requeued")
    shutil.rmtree(case.folder / "bin")
    case.resume()
    case.done("convert", "sft")
    return f"{cause}; resumed: done"


@scenario("the last good node fails its check", cluster={"NODES": 2}, seconds=40)
def last_node(case: Case) -> str:
    profile = case.profile(node_check='"echo fan 3 has stopped; exit 1"', options='{ exclude = "127.0.1.2" }')
    case.inject()
    case.submit("--until", "convert", profile=profile)
    cause = case.fails("convert", "fan 3 has stopped", seconds=60)
    assert "ExcNodeList=127.0.1.2" in _job(case, "convert").split(), "the only node left was excluded"
    return f"tried three times, never excluded: {cause}"


@scenario("a site's sbatch prints a banner, colours and a farewell round the id", seconds=10)
def sbatch_prints_more(case: Case) -> str:
    banner = 'echo "   Welcome to the Example Supercomputer"; printf "\\033[32m--> 3 of 9 days used\\033[0m\\n"'
    _wrap(
        case,
        "sbatch",
        f'{banner}; out=$({shutil.which("sbatch")} "$@"); code=$?; printf \'\\033[1m%s;main\\033[0m\\n\' "$out"; '
        'echo "see you"; exit $code',
    )
    case.inject()
    case.submit("--until", "sft")
    case.done("convert", "sft")
    return "the id is found: done"


@scenario("submitted from within another job", seconds=15)
def inside_a_job(case: Case) -> str:
    other = {
        "SLURM_JOB_ID": "99999",
        "SLURM_JOBID": "99999",
        "SLURM_JOB_NODELIST": "n7",
        "SLURM_NTASKS": "64",
        "SLURM_NNODES": "8",
        "SLURM_RESTART_COUNT": "5",
        "SLURM_CPU_BIND": "none",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_JOB_ID": "99990",
    }
    case.project.environment.update(other)
    case.inject()
    case.submit("--until", "sft")
    case.done("convert", "sft")
    return "its jobs are jobs of their own: done"


def _wrap(case: Case, program: str, text: str) -> None:
    """A program of this name, first on PATH of whoever submits and of the jobs."""
    folder = case.folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / program).write_text(f"#!/bin/bash\n{text}\n")
    (folder / program).chmod(0o755)
    case.project.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
