"""Reading progress, the queue's text, reasons and the ledger; when Slurm is asked, by scripts in
its place."""

import json
import os
from collections import Counter

import pytest

from launcher.config.stages import ALL
from launcher.run import progress
from launcher.run.folder import Busy, Run, is_alive, lock, this_process
from launcher.slurm import queue as jobs
from launcher.slurm.polling import Queue
from launcher.slurm.queue import Job
from launcher.status.row import format_age, format_eta
from launcher.status.state import StageState, overall, statuses_of

QUEUE = """\
11|11|N/A|COMPLETED|None|(null)|2026-01-02T03:04:05|n1|hh-1.convert|convoy run=hh-1 submission=5f stage=convert
12|12|N/A|FAILED|NonZeroExitCode|(null)|N/A|n1|hh-1.sft|convoy run=hh-1 stage=sft
15|15|N/A|PENDING|Priority|(null)|N/A||hh-1.sft|
12|12|N/A|RUNNING|None|(null)|N/A|n2|hh-12.reward|convoy run=hh-12 stage=reward
16|16|N/A|CANCELLED|Dependency|afterok:15(failed)|N/A||renamed|convoy run=hh-1 stage=rlhf
13|13|N/A|RUNNING|None|(null)|N/A|n1|hh-1|somebody's | own job
18|18|N/A|RUNNING|None|(null)|N/A|n1|a|b|(null)
"""


def test_jobs_are_matched_by_the_whole_run_id_and_the_live_one_wins():
    found = jobs.parse(QUEUE, "hh-1")
    assert {stage: (job.id, job.alive) for stage, job in found.items()} == {
        "convert": (11, False),
        "sft": (15, True),
        "rlhf": (16, False),
    }


@pytest.mark.parametrize(
    "index, expected",
    [(0, (21, "RUNNING", "20_0")), (2, (20, "PENDING", "20_2")), (7, (20, "PENDING", "20_7")), (5, None)],
)
def test_an_element_of_a_sweep_finds_its_job_in_the_array(index, expected):
    text = """\
20|20|1-3,7%2|PENDING|JobArrayTaskLimit|(null)|N/A||lr-9.sft|convoy run=lr-9 stage=sft
21|20|0|RUNNING|None|(null)|N/A|n1|lr-9.sft|convoy run=lr-9 stage=sft
"""
    found = jobs.parse(text, "lr-9", index).get("sft")
    assert (found and (found.id, found.state, found.handle)) == expected


@pytest.mark.parametrize(
    "job, words",
    [
        (Job(5, "PENDING", "Priority"), "jobs of higher priority come first"),
        (Job(5, "PENDING", "JobHeldUser"), "let it go: scontrol release 5"),
        (Job(5, "PENDING", "Dependency", "afterok:4(unfulfilled)"), "waits for sft, reward"),
        (Job(5, "PENDING", "Dependency", "afterok:4(failed)"), "its parent failed, so it will never start"),
        (Job(5, "PENDING", "DependencyNeverSatisfied"), "python -m launcher resume runs/hh"),
        (Job(5, "PENDING", "QOSGrpGRES"), "a limit of your QOS is reached (QOSGrpGRES)"),
        (Job(5, "PENDING", "AssocMaxJobsLimit"), "a limit of your account is reached (AssocMaxJobsLimit)"),
        (
            Job(5, "PENDING", "ReqNodeNotAvail, UnavailableNodes:n[1-2]"),
            "down, drained or reserved (UnavailableNodes:n[1-2])",
        ),
        (Job(5, "PENDING", "SomethingNew"), "SomethingNew"),
    ],
)
def test_why_a_job_waits_is_said_in_words(job, words):
    assert words in job.waits("sft, reward", "runs/hh")


def test_progress_reads_the_last_rows_and_the_time_left(tmp_path):
    rows = [
        {"iteration": n, "total": 100, "time": 1000.0 + 2 * n, "loss": 1 / n, "tokens_per_second": 10.0 * n}
        for n in range(1, 41)
    ]
    rows[9]["heldout_loss"] = 2.5
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + 'torn\n{"iteration": 41, "to'
    )
    (tmp_path / "sft/latest").write_text("30\n")
    far = progress.read(Run(tmp_path), ALL["sft"], since=1000.0)
    assert (far.iteration, far.total, far.speed, far.tokens_per_s, far.saved) == (
        40,
        100,
        pytest.approx(0.5),
        400.0,
        30,
    )
    assert far.eta_s == pytest.approx(120.0) and far.numbers == {"loss": 1 / 40, "heldout_loss": 2.5}


def test_speed_and_time_left_count_this_attempt_only(tmp_path):
    (tmp_path / "sft").mkdir()
    rows = [
        {"iteration": iteration, "total": 10, "time": seconds} for iteration, seconds in ((1, 0), (2, 5000), (4, 5010))
    ]
    (tmp_path / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    far = progress.read(Run(tmp_path), ALL["sft"], since=4990)
    assert (far.speed, far.eta_s) == (pytest.approx(0.2), pytest.approx(30))


@pytest.mark.parametrize("seconds, text", [(None, ""), (5, "0:05"), (65.4, "1:05"), (3661, "1:01:01")])
def test_time_left(seconds, text):
    assert format_eta(seconds) == text


@pytest.mark.parametrize(
    "seconds, text", [(-3, "0 s"), (99, "99 s"), (600, "10 min"), (9000, "2.5 h"), (200_000, "2 days")]
)
def test_ages(seconds, text):
    assert format_age(seconds) == text


@pytest.mark.parametrize(
    "kinds, expected",
    [
        (["done", "done"], "done"),
        (["done", "running"], "running"),
        (["done", "lost"], "failed"),
        (["done", "stopped"], "failed"),
        (["pending", "failed"], "failed"),
        (["not submitted", "done"], "idle"),
    ],
)
def test_overall(kinds, expected):
    assert overall([StageState("sft", kind) for kind in kinds]) == expected


def test_lock_is_for_one(tmp_path):
    with lock(tmp_path / ".lock"), pytest.raises(Busy, match="held by another"), lock(tmp_path / ".lock"):
        pass
    with lock(tmp_path / ".lock"):
        pass


def test_a_reused_pid_is_not_the_process():
    me = this_process()
    assert is_alive(me) and not is_alive({**me, "pid_start": me["pid_start"] - 1})
    assert not is_alive({**me, "pid": 2**22 + 1})


@pytest.fixture
def slurm_of_text(tmp_path, monkeypatch):
    """Callable: from now on Slurm's commands print such text (None: they fail as where the
    controller is down); returns the calls since."""
    log = tmp_path / "calls"

    def answer(**texts: str | None) -> list[str]:
        calls = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        for name, text in texts.items():
            (tmp_path / "text").write_text(text or "")
            last = 'echo "Slurmctld(primary) at n1 is DOWN"; exit 1' if text is None else f"cat <<'END'\n{text}\nEND"
            (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\n{last}\n')
            (tmp_path / name).chmod(0o755)
        return calls

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return answer


def slurm_run(folder, **about) -> Run:
    folder.mkdir(parents=True)
    identity = {"id": folder.name, "folder": str(folder), "profile": "site", **about}
    (folder / "config.json").write_text(
        json.dumps({"run": identity, "profile": {"name": "site", "scheduler": "slurm"}})
    )
    return Run(folder)


def test_a_controller_that_is_down_is_pinged_ever_more_rarely_and_asked_again_when_it_is_back(tmp_path, slurm_of_text):
    run, clock = slurm_run(tmp_path / "runs/x-1"), [0.0]
    queue = Queue(lambda: clock[0])

    def look(seconds: int) -> Counter:
        slurm_of_text()
        for _ in range(seconds):
            statuses_of([run], queue)
            clock[0] += 1
        return Counter(" ".join(call.split()[:2]).removesuffix(" -h") for call in slurm_of_text())

    slurm_of_text(scontrol=None, squeue=None)
    assert look(60) == {"scontrol ping": 3} and "is DOWN" in queue.trouble, "at 0, 10 and 40 s"
    assert look(600) == {"scontrol ping": 10}
    slurm_of_text(scontrol="Slurmctld(primary) at n1 is UP", squeue="")
    assert look(120) == {"scontrol ping": 1, "squeue": 3} and not queue.trouble, "a ping only after a failure"
    assert look(60) == {"squeue": 1}


def test_the_accounting_tells_of_an_element_of_a_sweep_what_its_array_was(tmp_path, slurm_of_text):
    runs = [
        slurm_run(tmp_path / f"runs/lr/{index}", sweep={"id": "lr-9", "index": index}, id=f"lr-9.{index}")
        for index in range(3)
    ]
    slurm_of_text(
        sacct="12|10_0|lr-9.sft|COMPLETED|2026-11-01T10:00:00|n1\n13|10_1|lr-9.sft|FAILED|2026-11-01T10:00:00|n1\n"
        "14|10_2|lr-9.sft|CANCELLED by 0|Unknown|None assigned\n99|99|other.sft|FAILED|Unknown|n1"
    )
    told = jobs.accounted({run: {"sft"} for run in runs})
    assert [told[run.id]["sft"].state for run in runs] == ["COMPLETED", "FAILED", "CANCELLED"]
    assert told["lr-9.1"]["sft"].handle == "10_1"
    (call,) = slurm_of_text(sacct="")
    assert "--name=lr-9.sft " in call


@pytest.mark.parametrize("reason", ["launch failed requeued held", "launch_failed_requeued_held"])
def test_a_job_that_slurm_holds_after_a_failed_launch_says_how_to_let_it_go(reason):
    """Slurm 22.05's squeue prints the reason with spaces."""
    assert Job(7, "PENDING", reason).waits("", "runs/demo").endswith("let it go: scontrol release 7")
