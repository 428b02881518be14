"""How often commands ask Slurm, counted by wrappers of its commands: a centre's controller serves
everybody."""

import os
import shutil
from collections import Counter

import pytest

from launcher.run.folder import Run
from launcher.slurm.polling import Queue
from launcher.status import state
from tests.support.stub_project import wait_until


@pytest.fixture
def calls(project):
    """Callable: the calls of Slurm's commands since it was called last, e.g. {"squeue": 2}; and
    its ``lines``, as they were called."""
    folder, log = project.folder / "bin", project.folder / "calls"
    folder.mkdir()
    for name in ("scontrol", "squeue", "sacct", "scancel", "sbatch", "sinfo"):
        (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\nexec {shutil.which(name)} "$@"\n')
        (folder / name).chmod(0o755)
    project.environment["PATH"] = f"{folder}:{os.environ['PATH']}"

    def count() -> Counter:
        count.lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return Counter(line.split()[0] for line in count.lines)

    return count


def watched(project, minutes: float, clock: list[float], queue: Queue):
    """Look each second of the clock, as ``watch`` and ``submit --wait`` do."""
    for _ in range(round(60 * minutes)):
        seen = state.statuses_of([Run(project.run)], queue)
        clock[0] += 1
    return seen[0]


def test_a_run_that_goes_on_costs_the_controller_a_question_a_minute(project, calls, monkeypatch):
    project.behave(sft={"step_s": 0.3})
    assert project.submit("--until", "sft", "--set", "sft.iterations=2000", profile="dev").returncode == 0
    wait_until(lambda: (project.run / "sft/latest").exists(), 40, "first checkpoint of sft")
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, project.environment[name])
    clock = [0.0]
    queue = Queue(lambda: clock[0])
    calls()
    assert watched(project, 1, clock, queue).overall == "running"
    assert calls() == {"scontrol": 1, "squeue": 3}, "0 s, 3 s for what is under way, 33 s; a ping before the first"
    watched(project, 10, clock, queue)
    assert calls() == {"squeue": 10}
    assert all(" -u " in line for line in calls.lines), "never everybody's jobs"
    Run(project.run).record("news")
    watched(project, 1, clock, queue)
    assert calls() == {"squeue": 3}, "news is asked after at once"
    told = project.convoy("cancel", "demo")
    assert told.returncode == 0 and "sft was running at iteration" in told.stdout, told.stdout + told.stderr
    said = calls()
    pings = calls.lines.count("scontrol ping")
    assert said["scancel"] <= 2 and said["squeue"] <= 7 and pings <= 1, calls.lines
    assert watched(project, 0.1, clock, queue).overall == "failed", "news of the end came through the files"


def test_a_submission_asks_for_its_own_jobs_once_for_all_elements(project, calls):
    sweep = [
        "submit",
        "full-pipeline",
        "--name",
        "lr",
        "--profile",
        "dev",
        "--until",
        "convert",
        "--sweep",
        "sft.lr=1e-5,2e-5,3e-5,4e-5",
    ]
    assert project.convoy(*sweep).returncode == 0
    assert calls()["squeue"] == 1, calls.lines
    cancelled = project.convoy("cancel", "lr")
    assert cancelled.returncode == 0 and cancelled.stdout.count("runs/lr/") >= 4, cancelled.stdout + cancelled.stderr
    assert calls()["squeue"] <= 7 and all(" -u " in line for line in calls.lines if line.startswith("squeue")), (
        calls.lines
    )
    resumed = project.convoy("resume", "lr")
    assert resumed.returncode == 0 and calls()["squeue"] <= 3, resumed.stdout + resumed.stderr
    assert project.convoy("cancel", "lr").returncode == 0
