"""A judge inside the allocation: the real server with a real model, built so that all it can say is
[[7]]."""

import contextlib
import json
import os
import select
import stat
import subprocess
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from eval import questions
from eval.config import MTBenchConfig, MTBenchPaths
from eval.errors import DataError, JudgeError
from eval.judge import ask_all, children, local_server, serve
from eval.judge.budget import Budget
from eval.judge.local_server import open_judge
from tests.eval.conftest import tokenizer
from tests.support.chat_templates import NO_SYSTEM
from tests.support.judge import answers

QUESTIONS = questions.load("embedded")


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """Its layers add nothing, so that the next token follows from the last one alone: [[7]], after
    which the text ends."""
    folder = tmp_path_factory.mktemp("judge")
    words = tokenizer()
    words.add_tokens(["[[7]]"])
    model = BloomForCausalLM(
        BloomConfig(
            vocab_size=len(words),
            hidden_size=24,
            n_layer=1,
            n_head=3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            seq_length=4096,
            tie_word_embeddings=False,
        )
    )
    block, seven = model.transformer.h[0], words.convert_tokens_to_ids("[[7]]")
    any_other, after_seven = torch.tensor([1.0, -1.0] * 12), torch.tensor([1.0] * 12 + [-1.0] * 12)
    with torch.no_grad():
        for layer in (block.self_attention.dense, block.mlp.dense_4h_to_h):
            layer.weight.zero_(), layer.bias.zero_()
        model.transformer.word_embeddings.weight[:] = any_other
        model.transformer.word_embeddings.weight[seven] = after_seven
        model.lm_head.weight.zero_()
        model.lm_head.weight[seven], model.lm_head.weight[2] = any_other, after_seven
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def settings(folder: Path, output: Path, **values) -> MTBenchConfig:
    paths = MTBenchPaths(output=str(output), models={}, heldout="", stages={}, report="")
    return MTBenchConfig(
        paths=paths, judge="local", judge_model=str(folder), judge_max_tokens=4, judge_server="transformers", **values
    )


def test_it_is_served_asked_and_ended(seven, tmp_path, capsys):
    config = settings(seven, tmp_path)
    made = {"sft": answers()["sft"][:4]}
    rows = ask_all.rate(config, ask_all.ratings(config, QUESTIONS, made), QUESTIONS.prompts, lambda n: None)[0]
    assert [row["score"] for row in rows] == [7] * 8 and {row["judge_id"] for row in rows} == {str(seven)}
    assert {row["judgment"] for row in rows} == {"[[7]]"} and all(
        row["tokens_out"] == 2 and row["tokens_in"] > 50 for row in rows
    )
    said = capsys.readouterr().out
    assert "it answers at http://127.0.0.1:" in said and "system text" not in said
    log = tmp_path / "logs/judge_server.log"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600 and "serving " in log.read_text()
    assert not [process for process in psutil.Process().children() if "eval.judge.serve" in " ".join(process.cmdline())]


def test_the_server_speaks_the_protocol_and_dies_with_its_parent(seven):
    script = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'eval.judge.serve', sys.argv[1], '--port', "
        "sys.argv[2], '--end-with-stdin'], stdin=subprocess.PIPE); input()"
    )
    port = local_server.free_port()
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(seven), str(port)], stdin=subprocess.PIPE, env=children.environment()
    )
    url = f"http://127.0.0.1:{port}"
    log = seven / "none.log"
    log.touch()
    assert local_server.wait(parent, port, 240, log) == port
    (child,) = psutil.Process(parent.pid).children()
    models = json.load(urllib.request.urlopen(url + "/v1/models"))
    assert models["data"][0]["id"] == str(seven)
    for body, status in (
        (b"{", 400),
        (b"{}", 400),
        (json.dumps({"messages": [{"role": "user", "content": "a b " * 5000}]}).encode(), 400),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url + "/v1/chat/completions", body)
        assert error.value.code == status and "message" in json.load(error.value)["error"]
    parent.kill()
    parent.wait()
    child.wait(10)


def test_a_server_that_ends_early_is_quoted(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    config = settings(broken, tmp_path)
    with (
        pytest.raises(
            JudgeError, match="ended with exit code 1 before it answered; it said last: .*logs/judge_server.log"
        ),
        open_judge(config, Budget(config)),
    ):
        pass


def test_one_that_never_answers_is_ended(tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdin=subprocess.PIPE)
    log = tmp_path / "log"
    log.write_text("loading weights\n")
    with pytest.raises(JudgeError, match="did not answer within .* it said last: 'loading weights'"):
        local_server.wait(sleeper, 0, 0.3, log)
    local_server.end(sleeper)
    assert sleeper.returncode == -15


def test_the_command_line(seven, tmp_path, monkeypatch):
    """vLLM where it stands beside the interpreter, and only there; our own server else."""
    with pytest.raises(JudgeError, match="no config.json there"):
        local_server.command(settings(tmp_path / "none", tmp_path))
    auto = {
        **settings(seven, tmp_path).__dict__,
        "judge_server": "auto",
        "judge_server_options": "--max-model-len 8192",
    }
    arguments, port = local_server.command(MTBenchConfig(**auto))
    assert port == 0 and arguments[4:] == [
        "eval.judge.serve",
        str(seven),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--end-with-stdin",
    ]
    with pytest.raises(JudgeError, match="vLLM is not installed beside"):
        local_server.command(MTBenchConfig(**auto | {"judge_server": "vllm"}))
    (tmp_path / "vllm").touch()
    (tmp_path / "site/vllm").mkdir(parents=True)
    (tmp_path / "site/vllm/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    arguments, port = local_server.command(MTBenchConfig(**auto))
    assert port and arguments == [
        str(tmp_path / "vllm"),
        "serve",
        str(seven),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        str(seven),
        "--max-model-len",
        "8192",
    ]
    for option in ("--api-key x", "--port=1", "--host 0.0.0.0", "'open"):
        with pytest.raises(ValueError, match="judge_server_options: "):
            MTBenchConfig(**auto | {"judge_server_options": option})


def test_whatever_the_model_raises_reaches_those_who_wait_and_the_next_batch_is_answered(monkeypatch):
    words = tokenizer()
    batcher = serve.Batcher(types.SimpleNamespace(config=types.SimpleNamespace(seq_length=64)), words)
    monkeypatch.setattr("eval.answers.generation.generate", lambda *_, **__: {}["no such token"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="KeyError: 'no such token'"):
            batcher.reply("a", 4)


FOREIGN = """
import http.server, json, sys
class Tens(http.server.BaseHTTPRequestHandler):
    def answer(self):
        print(self.command, self.path, self.headers.get("Authorization"), flush=True)
        text = json.dumps({"choices": [{"message": {"content": "Rating: [[10]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    do_GET = do_POST = answer
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tens)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def foreign():
    """(port, what it was asked so far, as a function): someone else's server that gives all tens;
    another user's, for root."""
    other = {"user": 65534} if os.geteuid() == 0 else {}
    process = subprocess.Popen(
        ["/usr/bin/env", "python3", "-c", FOREIGN], stdout=subprocess.PIPE, text=True, cwd="/", **other
    )
    try:
        yield int(process.stdout.readline()), lambda: select.select([process.stdout], [], [], 0)[0]
    finally:
        process.kill()
        process.wait()


def test_whoever_took_the_port_first_is_not_asked(seven, tmp_path, monkeypatch):
    """vLLM must be told a port: between the choice and its start another user may listen there."""
    with foreign() as (port, asked):
        monkeypatch.setattr(
            local_server, "command", lambda config: ([sys.executable, "-c", "import time; time.sleep(60)"], port)
        )
        monkeypatch.setattr(local_server, "POLL_S", 0.05)
        config = settings(seven, tmp_path)
        object.__setattr__(config, "judge_start_minutes", 0.01)
        with (
            pytest.raises(JudgeError, match="the local judge did not answer within"),
            open_judge(config, Budget(config)),
        ):
            pass
        assert not asked()


def test_a_judge_that_is_gone_is_not_believed(seven, tmp_path):
    """Its port may be another's by then."""
    config = settings(seven, tmp_path)
    with open_judge(config, Budget(config)) as endpoint:
        endpoint.alive()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(urllib.request.Request(endpoint.url, b"{}"))
        (child,) = [
            process for process in psutil.Process().children() if "eval.judge.serve" in " ".join(process.cmdline())
        ]
        assert (
            endpoint.key.text not in " ".join(child.cmdline())
            and endpoint.key.text not in (tmp_path / "logs/judge_server.log").read_text()
        )
        child.kill()
        child.wait(10)
        with pytest.raises(JudgeError, match="the local judge (has ended|no longer listens)"):
            endpoint.alive()


def test_a_template_without_a_system_turn_is_known_in_advance(seven, tmp_path, capsys):
    folder = tmp_path / "judge"
    folder.mkdir()
    for file in seven.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    config = settings(folder, tmp_path)
    made = {"sft": answers()["sft"][:1]}
    rows = ask_all.rate(config, ask_all.ratings(config, QUESTIONS, made), QUESTIONS.prompts, lambda n: None)[0]
    assert [row["score"] for row in rows] == [7, 7] and rows[0]["adapted"] == ["system text in the user's turn"]
    assert "has no system turn; system text is put into the user's turn" in capsys.readouterr().out
    (folder / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(DataError, match="mtbench.judge_model = .*judge: .*never"):
        local_server.takes_system(str(folder))


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "5",
        "null",
        "[" * 100_000,
        '{"messages": 5}',
        '{"messages": []}',
        '{"messages": ["a"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "tool", "content": "a"}]}',
        *(
            json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": count})
            for count in (0, -1, "5", 1.5, True, [1])
        ),
    ],
)
def test_a_request_that_is_none_is_refused(body):
    with pytest.raises(ValueError):
        serve.parse_request(body.encode())
