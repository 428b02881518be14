"""The chain without Slurm: each stage's supervisor here, in order, in the foreground or as a
background process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from launcher import run_module
from launcher.config import environment
from launcher.config.stages import Stage
from launcher.job.ranks import die_with_parent
from launcher.run import manifest
from launcher.run.folder import Busy, Run, is_alive, this_process
from launcher.submit.rewind import move_stale_aside
from training.config.schema import usage
from training.errors import ConfigError

STOP_S = 90
"""Seconds that a cancelled stage gets to save; then it is killed."""


def run_stages(run: Run, stages: list[Stage], tick: Callable[[], None] = lambda: None) -> int:
    """Run the stages in order until one fails; exit code of the last. ``tick`` is called several
    times a second.

    Raises Busy where another runner holds the run, KeyboardInterrupt after a Ctrl-C or TERM, when
    the running stage has saved and ended.
    """
    with run.lock():
        stages = manifest.left(run, stages)  # another runner may have worked until now
        move_stale_aside(run, stages)
        run.record("runner", stages=[stage.name for stage in stages], **this_process())
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for stage in stages:
                code = _supervised(run, stage, tick)
                tick()
                if code:
                    return code
        finally:
            # a full disk: that the process is gone says the same
            with contextlib.suppress(OSError):
                run.record("runner ended")
    return 0


def detached(command: list[str], log: TextIO, **options) -> subprocess.Popen:
    """A process in a session of its own, outside any job, whose output goes to ``log``."""
    return subprocess.Popen(
        command,
        env=environment.outside(),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **options,
    )


def start_in_background(run: Run, stages: list[Stage]) -> int:
    """A runner of its own session; returns its pid once it has the run's lock.

    Raises Busy where another runner has it, ConfigError where the new one ended at once.
    """
    path = run.folder / "runner.log"
    before = len(run.ledger())
    with open(path, "a", encoding="utf-8") as log:
        command = run_module.command("launcher.submit.local", str(run.folder), *(stage.name for stage in stages))
        process = detached(command, log)
    while not any(event["event"] == "runner" and event["pid"] == process.pid for event in run.ledger()[before:]):
        if process.poll() is not None:
            if process.returncode == os.EX_TEMPFAIL:
                raise Busy(f"another command has just started {run.folder}")
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
            raise ConfigError(f"the runner ended at once ({describe(process.returncode)}): {last}; all it said: {path}")
        time.sleep(0.02)
    return process.pid


def cancel(run: Run) -> bool:
    """Stop the run's local runner: TERM, then after STOP_S kill; False where none runs. ConfigError
    where it runs on another host."""
    runner = run.runner()
    if runner is None:
        return False
    if not here(runner):
        raise ConfigError(elsewhere(run, runner))
    end(runner)
    return True


def elsewhere(run: Run, runner: dict) -> str:
    """What to do where the run's runner is on another host."""
    return (
        f"{run.folder} is worked on by process {runner['pid']} on {runner['host']}: run the command "
        f"there; if that host is gone for good: python -m launcher resume {run.folder} --take-over"
    )


def here(record: dict) -> bool:
    """Whether a process of ``this_process()`` is of this host: the same pid elsewhere is somebody
    else's."""
    return record["host"] == socket.gethostname()


def end(record: dict) -> None:
    """TERM to a process of this host, and KILL when it has not ended after STOP_S."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(record["pid"], signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while is_alive(record) and time.monotonic() < deadline:
            time.sleep(0.05)
        if is_alive(record):
            os.kill(record["pid"], signal.SIGKILL)  # the supervisor and the ranks die with it


def _supervised(run: Run, stage: Stage, tick: Callable[[], None]) -> int:
    path, began = run.stage(stage.name) / "logs" / "supervise.log", time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        # its own session: a Ctrl-C reaches only this process, which then asks the stage to save
        command = run_module.command("launcher.job.supervise", str(run.folder), stage.name)
        process = detached(command, log, preexec_fn=die_with_parent)
    try:
        while process.poll() is None:
            tick()
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        run.record("cancelled", stage=stage.name)
        raise
    if process.returncode:
        _report_silent_end(run, stage, process.returncode, began, path)
    return process.returncode


def _report_silent_end(run: Run, stage: Stage, code: int, began: float, path: Path) -> None:
    """Say in status.json how the supervisor ended, where it has not come to say so itself: an
    import that fails, a configuration of another version."""
    status = run.status(stage.name)
    if status.get("updated", 0) >= began or (status["state"] == "running" and is_alive(status)):
        return
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    shared = {
        "cause": f"its supervisor ended with {describe(code)} before the stage began: {last}",
        "class": "bug",
        "attempt": status["attempt"],
        "job": None,
        "iteration": run.iteration(stage.name),
    }
    run.write_status(
        stage.name,
        state="failed",
        started=began,
        began=None,
        ended=time.time(),
        rank=None,
        lines=lines[-20:],
        advice=f"all it said: {path}",
        **shared,
        **this_process(),
    )
    run.record("failed", stage=stage.name, began=None, **shared)


def describe(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def main(arguments: list[str]) -> int:
    ended = usage(arguments, "launcher.submit.local", "RUN STAGE...", __doc__)
    if ended is not None:
        return ended
    try:
        run = Run.open(Path(arguments[0]))
        return run_stages(run, [run.stages[name] for name in arguments[1:]])
    except KeyboardInterrupt:
        return 130
    except Busy as error:
        print(f"error: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
