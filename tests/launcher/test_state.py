"""Reading progress, the queue's text, srun's messages and the ledger; no process is started."""

import json
import signal

import pytest

from launcher import probe
from launcher.pipeline import STAGES
from launcher.ranks import Ending, Log, SlurmRanks
from launcher.run import Busy, Run, is_alive, lock, this_process
from launcher.state import StageState, overall, progress
from launcher.view import duration

QUEUE = """\
11|COMPLETED|None|convoy run=hh-1 stage=convert
12|FAILED|NonZeroExitCode|convoy run=hh-1 stage=sft
15|PENDING|Priority|convoy run=hh-1 stage=sft
12|RUNNING|None|convoy run=hh-12 stage=reward
16|CANCELLED|Dependency|convoy run=hh-1 stage=rlhf
13|RUNNING|None|somebody's | own job
17|RUNNING|None|(null)
"""


def test_jobs_are_matched_by_the_whole_run_id_and_the_live_one_wins(monkeypatch):
    monkeypatch.setattr(probe, "call", lambda *command: QUEUE)
    found = probe.jobs("hh-1")
    assert {stage: (job.id, job.alive) for stage, job in found.items()} == {"convert": (11, False), "sft": (15, True), "rlhf": (16, False)}


def test_progress_reads_the_last_rows_and_the_time_left(tmp_path):
    rows = [{"iteration": n, "total": 100, "time": 1000.0 + 2 * n, "loss": 1 / n} for n in range(1, 41)]
    rows[9]["heldout_loss"] = 2.5
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 41, "to')
    made = StageState("sft", "running", started=1000.0)
    progress(Run(tmp_path), STAGES["sft"], made)
    assert (made.iteration, made.total, made.eta_s) == (40, 100, pytest.approx(120.0))
    assert made.numbers == {"loss": 1 / 40, "heldout_loss": 2.5}


def test_time_left_counts_this_attempt_only(tmp_path):
    (tmp_path / "sft").mkdir()
    rows = [{"iteration": iteration, "total": 10, "time": seconds} for iteration, seconds in ((1, 0), (2, 5000), (4, 5010))]
    (tmp_path / "sft/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = StageState("sft", "running", started=4990)
    progress(Run(tmp_path), STAGES["sft"], made)
    assert made.eta_s == pytest.approx(30)


@pytest.mark.parametrize("seconds, text", [(None, ""), (5, "0:05"), (65.4, "1:05"), (3661, "1:01:01")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("kinds, expected", [(["done", "done"], "done"), (["done", "running"], "running"), (["done", "lost"], "failed"),
                                             (["pending", "failed"], "failed"), (["not submitted", "done"], "idle")])
def test_overall(kinds, expected):
    assert overall([StageState("sft", kind) for kind in kinds]) == expected


@pytest.mark.parametrize("lines, expected", [
    (["srun: error: n2: task 3: Exited with exit code 9", "srun: error: n1: task 0: Exited with exit code 1"], (9, 3)),
    (["srun: error: n1: tasks 0-1: Exited with exit code 75"], (75, 0)),
    (["srun: error: n1: task 1: Killed", "srun: error: n1: task 0: Terminated"], (-signal.SIGKILL, 1)),
    (["srun: error: n1: task 1: Segmentation fault (core dumped)"], (-signal.SIGSEGV, 1)),
])
def test_first_task_that_srun_reports_is_the_cause(tmp_path, lines, expected):
    ranks = object.__new__(SlurmRanks)
    ranks.log, ranks.failed = Log(tmp_path / "log"), None
    for line in lines:
        ranks._line(line)
    assert (ranks.failed.code, ranks.failed.rank) == expected


def test_last_word_of_a_rank_is_its_exception(tmp_path):
    log = Log(tmp_path / "log")
    for text in ("iteration 3", "Traceback (most recent call last):", '  File "x.py"', "torch.OutOfMemoryError: tried 2 GiB", "bye"):
        log.write(1, text)
    assert Ending(1, 1, log.last[1]).cause() == "rank 1: exit code 1: torch.OutOfMemoryError: tried 2 GiB"
    assert (tmp_path / "log").read_text().startswith("[1] iteration 3\n[1] Traceback")


def test_an_exception_without_a_message_is_told_by_its_statement(tmp_path):
    log = Log(tmp_path / "log")
    for text in ("[rank1]: Traceback", "[rank1]:     assert loss > 0", "[rank1]:            ^^^^^^^^", "[rank1]: AssertionError"):
        log.write(1, text)
    assert log.last[1] == "AssertionError at `assert loss > 0`"


def test_lock_is_for_one(tmp_path):
    with lock(tmp_path / ".lock"), pytest.raises(Busy, match="held by another"), lock(tmp_path / ".lock"):
        pass
    with lock(tmp_path / ".lock"):
        pass


def test_a_reused_pid_is_not_the_process():
    me = this_process()
    assert is_alive(me) and not is_alive({**me, "pid_start": me["pid_start"] - 1})
    assert not is_alive({**me, "pid": 2**22 + 1})
