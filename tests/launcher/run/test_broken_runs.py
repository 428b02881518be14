"""What a crash, a full disk or another machine leaves behind, and what the launcher makes of it."""

import json
import subprocess
import sys

import pytest

from launcher.job.rank_log import Log
from launcher.job.ranks import LocalRanks
from launcher.run.folder import Run, this_process
from launcher.status import report
from launcher.submit import local
from training.errors import ConfigError


def test_a_torn_ledger_line_costs_that_line_only(tmp_path):
    run = Run(tmp_path)
    run.record("first")
    with open(tmp_path / "ledger.jsonl", "a") as ledger:
        ledger.write('{"time": 1, "eve')
    assert [event["event"] for event in run.ledger()] == ["first"]
    run.record("second")
    assert [event["event"] for event in run.ledger()] == ["first", "second"]


def test_cancel_does_not_touch_a_process_of_the_same_number_on_this_host(tmp_path):
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        run = Run(tmp_path)
        run.record("runner", stages=["sft"], **{**this_process(), "pid": sleeper.pid, "host": "login2"})
        with pytest.raises(ConfigError, match=f"process {sleeper.pid} on login2: run the command there"):
            local.cancel(run)
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_failed_rank_counts_although_the_log_can_t_be_written(tmp_path):
    log = Log(tmp_path / "log")
    log.file.close()
    log.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - closed by wait(): every write raises ENOSPC
    command = [sys.executable, "-c", "print('word'); raise SystemExit(3)"]
    assert LocalRanks(log, command, 1, {}).wait(lambda: None)[0].code == 3


def test_a_lost_report_is_made_again_by_the_same_command(project):
    project.submit("--wait")
    (project.run / "report.html").unlink()
    again = project.submit("--wait")
    assert again.returncode == 0 and (project.run / "report.html").exists()
    assert [event["stage"] for event in project.ledger("started")][-1] == "mtbench" and len(
        project.ledger("started")
    ) == 7


def test_a_judge_may_be_named_later_and_only_the_evaluation_runs_again(project):
    project.submit("--wait")
    again = project.submit(
        "--wait", "--set", "mtbench.judge=openai", "--set", "mtbench.judge_url=http://127.0.0.1:9/v1"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert [event["stage"] for event in project.ledger("started")][6:] == ["mtbench"]
    assert json.loads((project.run / "mtbench" / "config.json").read_text())["judge"] == "openai"


def test_prepared_data_that_was_lost_is_prepared_again(project):
    project.submit("--wait", "--until", "convert")
    marker = project.run / "data" / "DONE.json"
    made = json.loads(marker.read_text())
    marker.write_text(json.dumps(made | {"files": {"gone.jsonl": 1}}))
    project.submit("--wait")
    assert (project.folder / "prepared").read_text() == "once\nonce\n"
    assert (project.run / "report.html").exists()


@pytest.mark.parametrize("content", ['{"run": {"id": "x', "[]", '{"model_type": "bloom"}'])
def test_a_torn_or_foreign_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json is not a run's configuration"):
        Run.open(tmp_path).uses_slurm()


def test_a_report_of_neither_a_run_nor_an_evaluation_is_refused(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"{tmp_path}: neither a run .* nor an evaluation"):
        report.make([tmp_path], None)
