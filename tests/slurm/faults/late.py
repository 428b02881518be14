"""A controller that does what it is asked, and says so too late; submitters and guards that die
meanwhile."""

from __future__ import annotations

import os
import shutil
import time

from tests.slurm.faults.case import Case, scenario

TIMED_OUT = "Socket timed out on send/recv operation"


def _late_release(case: Case, then: str) -> None:
    """The submitter's release reaches Slurm; ``then`` is what the submitter sees of it. squeue is
    silent for 4 s."""
    folder = case.folder / "bin"
    folder.mkdir()
    release, queue = shutil.which("scontrol"), shutil.which("squeue")
    texts = {
        "scontrol": f"""case "$*" in release*)
  if tr '\\0' ' ' < /proc/$PPID/cmdline | grep -q ' launcher submit'; then
    {release} "$@"; touch {folder}/released; {then}
  fi ;;
esac
exec {release} "$@"
""",
        "squeue": f"""if [ -e {folder}/released ] && [ $(($(date +%s) - $(stat -c %Y {folder}/released))) -lt 4 ]; then
  echo 'slurm_load_jobs error: {TIMED_OUT}' >&2; exit 1
fi
exec {queue} "$@"
""",
    }
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    case.project.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    case.project.behave(convert={"step_s": 6})


def _goes_on(case: Case) -> None:
    case.notice(lambda: case.project.ledger("queued"), 30, "the submission is brought to its end")
    case.done("convert", "sft", "reward")
    assert not case.project.ledger("withdrawn"), "a healthy chain was cancelled"


@scenario("Slurm releases the chain but answers too late", seconds=25)
def late_release(case: Case) -> str:
    _late_release(case, f"echo 'slurm_suspend error: {TIMED_OUT}' >&2; exit 1")
    case.inject()
    said = case.project.submit("--until", "reward", profile="dev")
    assert said.returncode == 0 or "goes on" in said.stderr, said.stdout + said.stderr
    _goes_on(case)
    return "released again, nothing cancelled: done"


@scenario("submitter killed between release and record, its guard too", seconds=25)
def killed_after_release(case: Case) -> str:
    _late_release(case, "kill -9 $(pgrep -P $PPID -f launcher.slurm.transaction) $PPID; exit 1")
    case.inject()
    case.project.submit("--until", "reward", profile="dev")
    case.until(lambda: case.state("convert") == "running", 20, "convert runs")
    time.sleep(4)  # the queue answers again
    case.project.submit("--until", "reward", profile="dev")  # the next command on the run settles
    _goes_on(case)
    return "the next command sees that it runs: done"
