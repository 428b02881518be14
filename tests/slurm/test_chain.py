"""The real chain, real trainers on gloo, as six Slurm jobs: the command that a user types, watched
through squeue."""

import json
import os
import subprocess
import sys

from tests.support.stub_project import ROOT, wait_until

ORDER = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]
TINY = [
    "sft.iterations=4",
    "sft.warmup_iterations=0",
    "reward.iterations=4",
    "reward.warmup_iterations=0",
    "rlhf.iterations=2",
    "rlhf.warmup_iterations=0",
    "rlhf.value_warmup=0",
    "data.heldout_max=4",
    "mtbench.max_new_tokens=4",
    "mtbench.heldout_max_new_tokens=4",
    *(f"{stage}.{key}=2" for stage in ("sft", "reward", "rlhf") for key in ("micro_batch_size", "tensor_parallel")),
    *(f"{stage}.global_batch_size=4" for stage in ("sft", "reward", "rlhf")),
    "rlhf.rollout_batch_size=4",
    *(f"{stage}.pipeline_parallel=2" for stage in ("sft", "reward", "rlhf")),
    "convert.tensor_parallel=2",
    *(f"resources.{stage}.{key}=2" for stage in ("sft", "reward", "rlhf") for key in ("nodes", "gpus_per_node")),
]


def test_real_chain_runs_on_two_nodes_with_two_ranks_each(slurm, queue, tmp_path):
    run = tmp_path / "chain"
    command = [
        sys.executable,
        "-m",
        "launcher",
        "submit",
        "full-pipeline",
        "--recipe",
        "bloom-tiny",
        "--profile",
        "dev",
        "--runs",
        str(tmp_path),
        "--name",
        "chain",
        *(word for setting in TINY for word in ("--set", setting)),
    ]
    environment = {**os.environ, **slurm}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=180)
    identity = json.loads((run / "config.json").read_text())["run"]["id"]

    def in_queue() -> dict[str, str]:
        lines = [line.split("|") for line in queue("squeue", "-h", "-t", "all", "-o", "%k|%T").splitlines()]
        return {comment.rpartition("stage=")[2]: state for comment, state in lines if f"run={identity} " in comment}

    history = {}

    def ended() -> bool:
        now = in_queue()
        for stage, state in now.items():
            if state == "RUNNING":
                assert all(now[earlier] == "COMPLETED" for earlier in ORDER[: ORDER.index(stage)]), (
                    f"{stage} runs while {now}"
                )
            history.setdefault(stage, set()).add(state)
        return all(state not in ("PENDING", "RUNNING", "COMPLETING") for state in now.values())

    try:
        wait_until(ended, 400, f"end of the chain; jobs: {in_queue()}")
        status = subprocess.run(
            [sys.executable, "-m", "launcher", "status", str(run)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert in_queue() == dict.fromkeys(ORDER, "COMPLETED"), status.stdout
    finally:
        subprocess.run([sys.executable, "-m", "launcher", "cancel", str(run)], cwd=ROOT, env=environment)
    assert all("RUNNING" in history[stage] for stage in ("sft", "reward", "rlhf"))
    iterations = {stage: json.loads((run / stage / "DONE.json").read_text())["iteration"] for stage in ORDER}
    assert iterations == {"convert": 0, "sft": 4, "reward": 4, "rlhf": 2, "export": None, "mtbench": None}
    assert (run / "report.html").stat().st_size > 1000
