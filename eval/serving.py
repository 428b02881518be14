"""A judge inside the allocation: its server is started by the stage, waited for until it answers, and ended afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from eval.config import MTBenchConfig
from eval.errors import JudgeError

GRACE_S = 20
"""Seconds that the server has to end by itself."""
POLL_S = 0.2


@contextlib.contextmanager
def opened(config: MTBenchConfig) -> Iterator[str]:
    """Base address of the judge: ``judge_url``, or that of a local server that lives as long as the block. Raises JudgeError."""
    if config.judge != "local":
        yield config.judge_url
        return
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(config.paths.output) / "logs" / "judge_server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = command(config, port)
    print(f"judge: starting {shlex.join(arguments)}, its output is in {log}", flush=True)
    with open(log, "a", encoding="utf-8") as output:
        server = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment())
    try:
        url = f"http://127.0.0.1:{port}"
        seconds = wait(server, url, 60 * config.judge_start_minutes, log)
        print(f"judge: it answers at {url} after {seconds:.0f} s", flush=True)
        yield url + "/v1"
    finally:
        end(server)


def command(config: MTBenchConfig, port: int) -> list[str]:
    """Command line of the server; JudgeError where it can't be started here."""
    folder = Path(config.judge_model)
    if not (folder / "config.json").is_file():
        raise JudgeError(f'mtbench.judge_model = {config.judge_model}: no config.json there; judge = "local" needs the Hugging Face '
                         "folder of the judge's model")
    here = Path(sys.executable).with_name("vllm")
    installed = importlib.util.find_spec("vllm") is not None and here.exists()
    if config.judge_server == "vllm" and not installed:
        raise JudgeError(f'mtbench.judge_server = "vllm": vLLM is not installed beside {sys.executable}; install it there '
                         '(pip install vllm), or set "transformers"')
    if installed and config.judge_server != "transformers":
        return [str(here), "serve", config.judge_model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name",
                config.judge_model, *shlex.split(config.judge_server_options)]
    return [sys.executable, "-m", "eval.serve", config.judge_model, "--port", str(port), "--end-with-stdin"]


def environment() -> dict[str, str]:
    """Without what would make the server take itself for one of the stage's ranks."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks}


def wait(server: subprocess.Popen, url: str, limit_s: float, log: Path) -> float:
    """Seconds until GET /health says 200; JudgeError with the server's last words when it ends before, or with the limit."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    began = time.monotonic()
    while server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(url + "/health", timeout=5) as response:
            if response.status == 200:
                return time.monotonic() - began
        if time.monotonic() - began > limit_s:
            raise JudgeError(f"the local judge did not answer within mtbench.judge_start_minutes = {limit_s / 60:g}; {last_words(log)}")
        time.sleep(POLL_S)
    raise JudgeError(f"the local judge ended with exit code {server.returncode} before it answered; {last_words(log)}")


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"it said last: {lines[-1].strip()[:300]!r} (all of it: {log})" if lines else f"it said nothing ({log} is empty)"


def end(server: subprocess.Popen) -> None:
    """TERM to the server; what has not ended of it and its workers after GRACE_S is killed, by process id."""
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
