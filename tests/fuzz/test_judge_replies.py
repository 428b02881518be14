"""Damaged judge replies, answers to HTTP requests and judgment files: a completion, a rating or one
line that says what is wrong; never a traceback, a wait or memory that grows. CONVOY_FUZZ multiplies
the number of inputs."""

import contextlib
import json
import os
import random
import socket
import threading

import pytest

from eval.errors import DataError, JudgeError
from eval.files.jsonl import parse
from eval.judge import ask_all
from eval.judge.budget import Budget
from eval.judge.endpoint import Endpoint
from eval.judge.verdict import preference, rating
from eval.report import judgment_table
from tests.fuzz.damage import damaged_bytes, damaged_json, damaged_text, peak_mb, within
from tests.support.judge import QUESTIONS, Server, answers, config, good
from tests.support.ratings import RATINGS, pair

TIMES = int(os.environ.get("CONVOY_FUZZ", "1"))
REPLIES, CONNECTIONS, FILES, STORED = 1300 * TIMES, 400 * TIMES, 600 * TIMES, 200 * TIMES
GROWTH_MB = 400
TEXTS = [
    "Fine. Rating: [[7]]",
    "<think>[[5]]</think> Rating: [[9]]",
    '"[[A]]" or [[B]]',
    "[[" + "9" * 30_000,
    "<think>" * 3000,
    "[" * 30_000,
]
REPLY = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "judge-0613",
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": TEXTS[0], "refusal": None}}
    ],
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """An endpoint at an address that no one listens at, without waits; the test fails where memory
    grew."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    settings = config(type("At", (), {"url": "http://127.0.0.1:9/v1"}), tmp_path)
    endpoint = Endpoint(settings, settings.judge_url, Budget(settings), sleep=lambda seconds: None)
    endpoint.seconds = 5.0
    before = peak_mb()
    yield endpoint
    assert peak_mb() - before < GROWTH_MB, "memory grows with damaged replies"


def test_damaged_replies_are_completions_or_errors(asked):
    kinds = {"completion": 0, "error": 0}
    for number in range(REPLIES):
        rng = random.Random(number)
        reply = json.loads(json.dumps(REPLY))
        reply["choices"][0]["message"]["content"] = rng.choice(TEXTS)
        reply["choices"][0]["finish_reason"] = rng.choice(("stop", "length", "content_filter", None, "eos"))
        with within(20):
            try:
                completion = _read(asked, damaged_text(rng, reply))
                kinds["completion"] += 1
            except JudgeError as error:
                assert "\n" not in str(error) and len(str(error)) < 2000, number
                kinds["error"] += 1
                continue
            row = {
                "judgment": completion.text,
                "judge_id": completion.model,
                "score": rating(completion.text, completion.finish).value,
            }
            assert parse(json.dumps(row, ensure_ascii=False), "x") and len(completion.model) <= 200, number
            assert preference(completion.text).value in ("A", "B", "tie", "error") and completion.tokens_out < 10**9
    assert min(kinds.values()) > REPLIES // 10, kinds


def _read(endpoint: Endpoint, body: bytes):
    """What ``complete`` does with a reply of status 200, without the network."""
    from unittest import mock

    from eval.judge import transport

    with mock.patch.object(transport, "send", lambda *_: transport.Reply(200, "OK", {}, body)):
        return endpoint.complete("", "")


@contextlib.contextmanager
def raw_server():
    """(address, list of answers): sends the last of the list, byte for byte, whatever it is asked,
    and closes."""
    answer, listener = [b""], socket.create_server(("127.0.0.1", 0))

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1 << 16)
                    connection.sendall(answer[0])
                    connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions", answer
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_damaged_answers_to_a_request_are_completions_or_errors(asked):
    body = json.dumps(REPLY).encode()
    head = b"\r\n".join(
        (
            b"HTTP/1.1 %d OK",
            b"Content-Type: application/json",
            b"Retry-After: %s",
            b"Location: http://u:p@h/?key=s",
            b"Content-Length: %d",
            b"",
            b"",
        )
    )
    with raw_server() as (asked.url, answer):
        for number in range(CONNECTIONS):
            rng = random.Random(number)
            status = rng.choice((200, 200, 200, 204, 301, 400, 401, 404, 413, 429, 500, 503, 999))
            length = rng.choice((len(body), len(body), 0, 10**12, -1))
            whole = head % (status, rng.choice((b"0", b"NaN", b"1e999", b"Wed, 99", b"-5", b"9" * 400)), length) + body
            answer[0] = damaged_bytes(rng, whole) if rng.random() < 0.7 else whole
            with within(60), contextlib.suppress(JudgeError):
                assert asked.complete("", "").text is not None
            asked.budget.stopped.clear()


@pytest.mark.parametrize(
    "rows", [RATINGS[:6], [pair(81, turn, "model_1", "tie") for turn in (1, 2)]], ids=["single", "pair"]
)
def test_damaged_judgment_files_are_tables_or_one_line(asked, tmp_path, capsys, rows):
    path, codes = tmp_path / "x.jsonl", {0: 0, 4: 0, 65: 0}
    for number in range(FILES // 2):
        rng = random.Random(number)
        lines = [json.dumps(row).encode() if rng.random() < 0.7 else damaged_text(rng, row) for row in rows]
        path.write_bytes(b"\n".join(lines) if rng.random() < 0.8 else damaged_bytes(rng, b"\n".join(lines)))
        with within(30):
            code = judgment_table.main([str(path)])
        out, said = capsys.readouterr()
        codes[code] += 1
        assert (said.count("\n"), bool(out)) == ((1, False) if code == 65 else (0, True)), number
        assert "\x1b" not in out + said
    assert codes[65] > FILES // 20 and codes[0] + codes[4] > FILES // 20, codes


def test_damaged_rows_of_an_earlier_start_are_asked_again(asked, tmp_path, monkeypatch):
    """Both ratings are there in the end; a file that is not JSON lines is named."""
    monkeypatch.setenv("JUDGE_KEY", "none")
    server, made = Server([], good()), {"sft": answers()["sft"][:1]}
    try:
        settings = config(server, tmp_path)
        works = ask_all.ratings(settings, QUESTIONS, made)
        rows = ask_all.rate(settings, works, QUESTIONS.prompts, lambda n: None)[0]
        for number in range(STORED):
            rng = random.Random(number)
            lines = [json.dumps(damaged_json(rng, row) if rng.random() < 0.7 else row, default=str) for row in rows]
            works[0].path.write_text("\n".join(lines) + "\n", errors="replace")
            works[0].superseded.unlink(missing_ok=True)
            with within(30), contextlib.suppress(DataError):
                found = ask_all.rate(settings, works, QUESTIONS.prompts, lambda n: None)[0]
                assert len(found) == 2 and all(type(row["score"]) in (int, float) for row in found), number
    finally:
        server.server.shutdown()
        server.server.server_close()
