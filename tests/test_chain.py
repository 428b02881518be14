"""The whole chain on this machine by its real command line: real preference data, a kill -9 in the
middle, resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
HH = SHARED / "hh_harmless" / "harmless-base.test.jsonl.gz"
STAGES = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]
SHORT = [
    "sft.iterations=4",
    "sft.warmup_iterations=0",
    "reward.iterations=4",
    "reward.warmup_iterations=0",
    "rlhf.warmup_iterations=0",
    "rlhf.rollout_batch_size=32",
    "rlhf.global_batch_size=32",
    "rlhf.micro_batch_size=16",
    "model.demo_layers=2",
    "data.heldout_max=8",
    "mtbench.max_new_tokens=4",
    "mtbench.heldout_max_new_tokens=4",
]


def single(*stages: str) -> list[str]:
    """One rank each."""
    return [
        value for stage in stages for value in (f"{stage}.pipeline_parallel=1", f"resources.{stage}.gpus_per_node=1")
    ]


def convoy(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=280, check=False)


def submit(runs: Path, name: str, *sets: str) -> list[str]:
    return [
        "submit",
        "full-pipeline",
        "--recipe",
        "bloom-tiny",
        "--profile",
        "local",
        "--runs",
        str(runs),
        "--name",
        name,
        "--wait",
        *(option for value in [*SHORT, *sets] for option in ("--set", value)),
    ]


def status(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "status.json").read_text())


@pytest.mark.skipif(not HH.exists(), reason="real data is not beside the project")
def test_real_hh_pairs_and_real_questions_go_through_the_same_command(tmp_path):
    """Anthropic's file as it comes from the Hub, with its odd rows; the real question set from the
    wheel."""
    wheel = next((SHARED / "mt_bench_questions").glob("*.whl"))
    done = convoy(
        *submit(
            tmp_path,
            "hh",
            f"data.source={HH}",
            f"mtbench.questions={wheel}",
            "rlhf.iterations=2",
            "mtbench.context_length=64",
            *single("sft", "reward", "rlhf"),
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "hh"
    assert all((run / stage / "DONE.json").exists() for stage in STAGES)
    counts = json.loads((run / "data" / "counts.json").read_text())
    assert "2312" in json.dumps(counts).replace(",", "")
    results = json.loads((run / "mtbench" / "results.json").read_text())
    assert results["questions"]["label"] == "MT-Bench" and results["questions"]["count"] == 80
    assert results["scores"] is None and "No judge" in (run / "report.html").read_text()


def test_kill_9_of_a_rank_during_ppo_then_resume(tmp_path):
    """The command fails with the rank named; resume goes on from the last checkpoint and runs no
    done stage again. The model is a Llama."""
    run = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "launcher",
        *submit(
            tmp_path,
            "killed",
            "model.demo_family=llama",
            "rlhf.iterations=8",
            "rlhf.save_every=2",
            *single("sft", "reward"),
        ),
    ]
    first = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 200
        while not (run / "rlhf" / "latest").exists():
            assert first.poll() is None and time.monotonic() < end, first.communicate()[0]
            time.sleep(0.05)
        config = str(run / "rlhf" / "config.json")
        ranks = [
            int(pid.name)
            for pid in Path("/proc").iterdir()
            if pid.name.isdigit() and _runs(pid, "training.ppo", config)
        ]
        assert len(ranks) == 2
        os.kill(max(ranks), signal.SIGKILL)
        output, _ = first.communicate(timeout=60)
    finally:
        if first.poll() is None:
            first.terminate()
            first.wait(30)
    assert first.returncode == 1 and "SIGKILL" in output, output
    assert status(run, "rlhf")["state"] == "failed"
    saved = int((run / "rlhf" / "latest").read_text())
    assert 2 <= saved < 8 and not (run / "rlhf" / "DONE.json").exists()

    second = convoy("resume", str(run), "--wait")
    assert second.returncode == 0, second.stdout + second.stderr
    rows = [json.loads(line)["iteration"] for line in (run / "rlhf" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))
    assert {stage: status(run, stage)["attempt"] for stage in STAGES} == dict.fromkeys(STAGES, 1) | {"rlhf": 2}
    assert f"resumed from iteration {saved}" in (run / "rlhf" / "logs" / "attempt_2.log").read_text()

    third = convoy("resume", str(run), "--wait")
    assert third.returncode == 0 and "nothing left to do" in third.stdout


def _runs(pid: Path, *words: str) -> bool:
    try:
        command = (pid / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return False
    return all(word in command for word in words)
