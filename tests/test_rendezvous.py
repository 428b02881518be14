"""RANK, WORLD_SIZE and MASTER_ADDR that are left over in a shell: refused or given up, never waited
for without end."""

import datetime
import os
import signal
import subprocess
import sys
import time

import pytest

from eval import rendezvous as evaluation
from eval.errors import SurroundingsError
from eval.judge import children
from tests.support.stub_project import ROOT, wait_until
from training.distributed import rendezvous as training
from training.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CONVOY_ATTEMPT", "TORCHELASTIC_RUN_ID")
BOTH = [(training, ConfigError, (datetime.timedelta(seconds=9),)), (evaluation, SurroundingsError, ())]
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def shell(monkeypatch):
    def put(variables: dict) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("module, error, rest", BOTH)
def test_one_process_is_rank_0_whatever_else_is_left_over(module, error, rest, shell):
    for variables in (
        {},
        {"RANK": "3"},
        {"WORLD_SIZE": "1", "RANK": "7"},
        {"WORLD_SIZE": "", "RANK": "", "MASTER_PORT": "x"},
    ):
        shell(variables)
        assert module.place() == (0, 1)
    shell(WHOLE | {"MASTER_PORT": "29500", "RANK": "1"})
    assert module.place() == (1, 2)


@pytest.mark.parametrize("module, error, rest", BOTH)
@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"RANK": ""},
        {"WORLD_SIZE": "two"},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": "ssh"},
        {"MASTER_PORT": "99999"},
        {"RANK": None},
    ],
)
def test_what_can_t_be_is_refused_and_names_the_variables(module, error, rest, change, shell):
    shell({name: value for name, value in {**WHOLE, "MASTER_PORT": "29500", **change}.items() if value is not None})
    with pytest.raises(error, match=r"(RANK|WORLD_SIZE).*expected 0 <= RANK < WORLD_SIZE.*env -u RANK"):
        module.place()


@pytest.mark.parametrize("module, error, rest", BOTH)
def test_the_wait_for_ranks_that_never_come_ends(module, error, rest, shell, monkeypatch, capfd):
    monkeypatch.setattr(module, "LIMITS_S", {"": 1})
    # the first listens, the second connects
    for variables in (WHOLE, WHOLE | {"RANK": "1", "MASTER_PORT": "1"}):
        shell(variables)
        with pytest.raises(error, match="the others did not come to 127.0.0.1:.* within 1 s"):
            module.join("gloo", int(variables["RANK"]), 2, *rest)
    assert "waits at most 1 s for the others" in capfd.readouterr().err


def test_term_ends_the_wait():
    """The evaluation's own handler would run only after it: torch waits in C++."""
    code = (
        "import signal; signal.signal(signal.SIGTERM, lambda *_: None); from eval import rendezvous; "
        "rendezvous.join('gloo', *rendezvous.place())"
    )
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**kept, **WHOLE, "MASTER_PORT": str(20000 + os.getpid() % 9000)},
    )
    try:
        assert "waits at most 60 s" in process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, 20, "its end")
        assert process.returncode == -signal.SIGTERM
    finally:
        process.kill()


def test_the_evaluation_s_children_are_ours_and_no_ranks(tmp_path, shell):
    """A judge's server that is started where a folder eval/ lies, by rank 0 of two."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/__init__.py").write_text("raise SystemExit('the user\\'s own package')")
    shell(WHOLE | {"TORCHELASTIC_RUN_ID": "x"})
    environ = children.environment()
    assert (
        not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environ)
        and environ["PATH"] == os.environ["PATH"]
    )
    done = subprocess.run(
        children.command("eval.scores", "--help"), cwd=tmp_path, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stdout + done.stderr
