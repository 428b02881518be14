"""A judge's server, its replies, and answers to be judged."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval import questions
from eval.config import MTBenchConfig, MTBenchPaths
from eval.judge import ask_all
from eval.judge.budget import Budget
from eval.judge.endpoint import Endpoint

KEY = "sk-very-secret"

KNOWN = "capital of France"
"""Stands in the known item alone."""


def good(text: str = "Fine. Rating: [[7]]", model: str = "judge-0613") -> tuple:
    return 200, {}, json.dumps({"model": model, "choices": [{"message": {"content": text}}]})


class Server:
    """Answers each request with the next of ``script`` (status, headers, body), then with ``rest``,
    which may be a function of the request's body; keeps what it was asked. The status 0 stands for
    a second of silence."""

    def __init__(self, script: list, rest: tuple):
        self.script, self.rest, self.seen = list(script), rest, []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append((self.path, dict(self.headers), body))
                    answer = outer.script.pop(0) if outer.script else outer.rest
                status, headers, text = answer(body) if callable(answer) else answer
                if status == 0:
                    time.sleep(1)
                    status = 200
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
                    self.send_header(name, value)
                with contextlib.suppress(OSError):  # who waited may have left
                    self.end_headers()
                    self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    servers = []

    def start(*script, rest=None):
        servers.append(Server(list(script), rest or good()))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


def client(server, waits: list, **values) -> Endpoint:
    settings = config(server, "", judge_model="judge", **values)
    return Endpoint(settings, server.url, Budget(settings), sleep=waits.append)


QUESTIONS = questions.load("embedded")
IDS = [question.question_id for question in QUESTIONS.questions]


def config(server, output, **values) -> MTBenchConfig:
    paths = MTBenchPaths(output=str(output), models={}, heldout="", stages={}, report="")
    return MTBenchConfig(
        paths=paths,
        judge="openai",
        judge_url=server.url,
        judge_key_variable="JUDGE_KEY",
        **{"judge_model": "org/judge", **values},
    )


def answers(text: str = "mine") -> dict[str, list[dict]]:
    return {
        "sft": [
            {
                "question_id": question.question_id,
                "model_id": "sft",
                "answer_id": f"{text}{question.question_id}",
                "choices": [{"index": 0, "turns": [f"{text} {{1}}", f"{text} 2"]}],
            }
            for question in QUESTIONS.questions
        ]
    }


def rate(server, output, made, **values):
    counts = []
    settings = config(server, output, **values)
    works = ask_all.ratings(settings, QUESTIONS, made)
    return ask_all.rate(settings, works, QUESTIONS.prompts, counts.append)[0], counts
