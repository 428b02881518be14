"""What others wrote (a rank's line, a cause, a name) steers no terminal: tried on a real one, in
status, watch, logs and errors."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from launcher.run.folder import write_json
from launcher.status.terminal import UNSEEN, plain
from tests.support.stub_project import ROOT

EVIL = "\x1b]0;title\x07\x1b[2J\x1b[8m\x9b31m\x85\u202eexe.\u2066\x08\x7f[red]x[/red] [/nothing]"
OURS = re.compile(r"\x1b\[(\d+(;\d+)*m|K|H|J|\?(1049|25|7)[hl])")
"""Colours, and what a redrawn screen needs."""


def on_a_terminal(*arguments: str, cwd) -> tuple[int, str]:
    """(exit code, all that a terminal of 100 columns got)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        said += part
        if not part:
            break
    os.close(ours)
    return process.wait(timeout=30), said.decode("utf-8")


@pytest.fixture
def evil(tmp_path):
    """runs/hh, whose files hold EVIL wherever a text may stand."""
    run = tmp_path / "runs" / "hh"
    write_json(
        run / "config.json",
        {"run": {"id": f"hh{EVIL}", "profile": EVIL, "folder": "runs/hh"}, "profile": {"scheduler": "local"}},
    )
    write_json(
        run / "sft/status.json",
        {
            "state": "failed",
            "attempt": 1,
            "job": None,
            "cause": f"why {EVIL}",
            "class": EVIL,
            "rank": 0,
            "advice": EVIL,
            "lines": [f"last words {EVIL}", EVIL],
        },
    )
    log = run / "sft/logs/attempt_1.log"
    log.parent.mkdir()
    log.write_text(f"2026-11-23T14:00:00.000 [0] a line {EVIL}\nno stamp {EVIL}\n")
    (run / "ledger.jsonl").write_text(json.dumps({"time": 1, "event": "started", "stage": "sft", "attempt": 1}) + "\n")
    return tmp_path


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("status", "hh"), "why"),
        (("status",), "why"),
        (("watch", "hh"), "why"),
        (("logs", "hh"), "a line"),
        (("logs", "hh", "-n", "1"), "no stamp"),
        (("resume", "hh", "--from", "convert"), "hh"),
        (("status", f"runs/{EVIL}"), "is not a run"),
        (("report", f"{EVIL}"), "is not a run"),
    ],
)
def test_no_command_lets_it_through(evil, arguments, word):
    _, said = on_a_terminal(*arguments, cwd=evil)
    rest = OURS.sub("", said).replace("\r\n", "\n")
    assert word in rest and not UNSEEN.search(rest), ascii(said)
    assert "Traceback" not in said


def test_a_sweep_s_table_shows_text_as_it_stands(evil):
    sweep = evil / "runs/lr"
    (evil / "runs/hh").rename(evil / "runs/x")
    sweep.mkdir()
    (evil / "runs/x").rename(sweep / "0")
    write_json(sweep / "sweep.json", {"id": f"lr{EVIL}", "values": [{f"sft.lr{EVIL}": EVIL}]})
    code, said = on_a_terminal("status", "lr", cwd=evil)
    rest = OURS.sub("", said).replace("\r\n", "\n")
    assert code == 0 and not UNSEEN.search(rest) and "Traceback" not in said, ascii(said)
    assert "[red]" in rest


def test_plain_keeps_what_is_text():
    text = "Grüße, 你好, \u0301 e\u0301, \U0001f600\ttab\nline"
    assert plain(text) == text
