"""A judge inside the allocation: its server is started by the stage, waited for until it answers,
and ended afterwards.

Other people use the node, too. The server is told a key that is made for this start, and nothing is
sent to a port that another process than the server or its children listens on: whoever took the
port first could give all answers a ten.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from eval.answers import chat
from eval.config import MTBenchConfig
from eval.errors import DataError, JudgeError
from eval.judge import children, transport
from eval.judge.budget import Budget
from eval.judge.endpoint import Endpoint
from eval.judge.key import Key

GRACE_S = 20
"""Seconds that the server has to end by itself."""
POLL_S = 0.2
HOST = "127.0.0.1"
KEY_VARIABLES = ("CONVOY_JUDGE_KEY", "VLLM_API_KEY")
"""Where eval.judge.serve and vLLM look for the key that they ask for: a command line can be read by
all users."""


@contextlib.contextmanager
def open_judge(config: MTBenchConfig, budget: Budget) -> Iterator[Endpoint]:
    """An endpoint whose server runs for as long as the block. Raises JudgeError and DataError."""
    merge_system = not takes_system(config.judge_model)
    key = Key(secrets.token_urlsafe(32), "the key made for this start")
    log = Path(config.paths.output) / "logs" / "judge_server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments, port = command(config)
    print(f"judge: starting {shlex.join(arguments)}, its output is in {log}", flush=True)
    with open(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as output:
        server = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=children.environment() | dict.fromkeys(KEY_VARIABLES, key.text),
        )
    try:
        began = time.monotonic()
        port = wait(server, port, 60 * config.judge_start_minutes, log)
        url = f"http://{HOST}:{port}"
        print(f"judge: it answers at {url} after {time.monotonic() - began:.0f} s", flush=True)
        yield Endpoint(
            config,
            url + "/v1",
            budget,
            key=key,
            alive=lambda: require_own(server, port, log),
            merge_system=merge_system,
        )
    finally:
        end(server)


def takes_system(folder: str) -> bool:
    """Can the judge's chat template render a system turn? Raises DataError where it can't render a
    question, either."""
    try:
        template, tokens = chat.read(folder)
        if not template or chat.takes_system(template, tokens):
            return True
        chat.render(template, [chat.USER], tokens)
    except DataError as error:
        raise DataError(f"mtbench.judge_model = {folder}: {error}") from None
    print(
        f"judge: the chat template of {folder} has no system turn; system text is put into the user's turn", flush=True
    )
    return False


def command(config: MTBenchConfig) -> tuple[list[str], int]:
    """(command line of the server, the port that it is told; 0: it chooses one); JudgeError where
    it can't start."""
    folder = Path(config.judge_model)
    if not (folder / "config.json").is_file():
        raise JudgeError(
            f'mtbench.judge_model = {config.judge_model}: no config.json there; judge = "local" needs the '
            "Hugging Face folder of the judge's model"
        )
    vllm = Path(sys.executable).with_name("vllm")
    installed = importlib.util.find_spec("vllm") is not None and vllm.exists()
    if config.judge_server == "vllm" and not installed:
        raise JudgeError(
            f'mtbench.judge_server = "vllm": vLLM is not installed beside {sys.executable}; install it '
            'there (pip install vllm), or set "transformers"'
        )
    if installed and config.judge_server != "transformers":
        port = free_port()
        return [
            str(vllm),
            "serve",
            config.judge_model,
            "--host",
            HOST,
            "--port",
            str(port),
            "--served-model-name",
            config.judge_model,
            *shlex.split(config.judge_server_options),
        ], port
    return children.command(
        "eval.judge.serve", config.judge_model, "--host", HOST, "--port", "0", "--end-with-stdin"
    ), 0


def free_port() -> int:
    """A port that no one listens on now; who takes it before the server does is not asked
    (``listening``)."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def listening(server: subprocess.Popen) -> set[int]:
    """Ports of HOST that the server or a process that it started listens on."""
    addresses = set()
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(server.pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):
                addresses |= {
                    each.laddr.port
                    for each in process.net_connections("tcp4")
                    if each.status == psutil.CONN_LISTEN and each.laddr.ip in (HOST, "0.0.0.0")
                }
    return addresses


def require_own(server: subprocess.Popen, port: int, log: Path) -> None:
    """JudgeError where the server has ended, or does not listen at ``port`` any more."""
    if server.poll() is not None:
        raise JudgeError(f"the local judge has ended with exit code {server.returncode}; {last_words(log)}")
    if port not in listening(server):
        raise JudgeError(f"the local judge no longer listens at {HOST}:{port}; {last_words(log)}")


def wait(server: subprocess.Popen, port: int, limit_s: float, log: Path) -> int:
    """The port at which the server itself answers GET /health with 200, of its ports if ``port`` is
    0.

    Raises JudgeError with the server's last words when it ends before, or with the limit.
    """
    began = time.monotonic()
    while server.poll() is None:
        for own in sorted(listening(server) & {port} if port else listening(server)):
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if transport.send(f"http://{HOST}:{own}/health", None, {}, 5).status == 200:
                    return own
        if time.monotonic() - began > limit_s:
            raise JudgeError(
                "the local judge did not answer within mtbench.judge_start_minutes "
                f"= {limit_s / 60:g}; {last_words(log)}"
            )
        time.sleep(POLL_S)
    raise JudgeError(f"the local judge ended with exit code {server.returncode} before it answered; {last_words(log)}")


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"it said nothing ({log} is empty)"
    return f"it said last: {lines[-1].strip()[:300]!r} (all of it: {log})"


def end(server: subprocess.Popen) -> None:
    """TERM to the server; what has not ended of it and its workers after GRACE_S is killed, by
    process id."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(server.pid).children(recursive=True)
    server.stdin.close()
    server.terminate()
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in psutil.wait_procs(family, timeout=1)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
