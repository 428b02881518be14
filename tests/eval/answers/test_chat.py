"""Chat templates: what transformers renders, in a process that a hostile template can't keep, fill
or leave."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from eval.answers import chat
from eval.judge import serve
from tests.support.chat_templates import NO_SYSTEM, PUBLISHED
from training.files import chat_template

pytestmark = pytest.mark.long

LOOPS = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3


def words(template):
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    "template",
    [
        NO_SYSTEM,
        "{{ bos_token }}{% for m in messages %}\n  {% generation %}{{ m | tojson }}{% endgeneration %}\n{% endfor %}",
        "{% set seen = namespace(n=0) %}{% for m in messages %}{% set seen.n = seen.n + 1 %}{% if seen.n > 1 %}{% "
        "break %}{% endif %}{{ m.content | trim }}{{ strftime_now('%Y') }}{% endfor %}",
        *(path.read_text() for path in sorted(PUBLISHED.glob("*.jinja"))),
    ],
)
def test_it_renders_what_transformers_renders(template):
    tokenizer = words(template)
    for messages in (*chat.TRIAL, [chat.SYSTEM, *chat.TRIAL[1]]):
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            with pytest.raises(chat.TemplateError):
                chat.render_by(tokenizer, messages)
        else:
            assert chat.render_by(tokenizer, messages) == expected


@pytest.mark.parametrize(
    "template, said",
    [
        (LOOPS, "takes more than .* does it loop without end"),
        ("{{ '%999999999d' % 1 }}", "more than|MemoryError|characters of one conversation"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ 'a' * 2 ** 23 }}", "makes 8,388,608 characters"),
        ("{% for", "fails at line 1: TemplateSyntaxError"),
        ("{{ a.b.c }}", "UndefinedError: 'a' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ raise_exception('no\n way') }}", "TemplateError: no way"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("x" * 2**21, "2,097,152 characters"),
    ],
)
def test_a_hostile_template_is_an_error_and_the_next_one_renders(template, said, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    with pytest.raises(chat.TemplateError, match=said) as refused:
        chat.render(template, chat.TRIAL[0])
    assert "\n" not in str(refused.value)
    assert chat.render("{{ messages[0].content }}", chat.TRIAL[0]) == chat.USER["content"]


def test_no_secret_reaches_it_and_threads_may_share_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat.render("", [])
    environment = Path(f"/proc/{chat_template._worker.process.pid}/environ").read_bytes()
    assert b"secret" not in environment
    found = {}

    def ask(number):
        found[number] = chat.render("{{ messages[0] }}", [number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == {number: str(number) for number in range(8)}
    os.kill(chat_template._worker.process.pid, 9)
    time.sleep(0.1)
    assert chat.render("x", []) == "x", "another process takes the place of one that was killed"


@pytest.mark.parametrize(
    "files, said",
    [
        ({"tokenizer_config.json": "{}"}, "has no chat template"),
        ({}, "has no chat template"),
        ({"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json can't be read as JSON"),
        ({"tokenizer_config.json": "[]"}, "holds no JSON object"),
        ({"chat_template.jinja": "\xff"}, "is no UTF-8"),
        ({"tokenizer_config.json": json.dumps({"chat_template": 5})}, "chat_template is int; expected a text"),
        ({"chat_template.jinja": "x"}, "leaves out what was said"),
        ({"chat_template.jinja": "{{ raise_exception('not me') }}"}, "TemplateError: not me"),
    ],
)
def test_a_folder_is_checked(files, said, tmp_path, capsys):
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    assert chat.main([str(tmp_path)]) == 65
    error = capsys.readouterr().err
    assert said in error and str(tmp_path) in error and error.count("\n") == 1


def test_a_pipe_is_no_template(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(chat.TemplateError, match="it is not a file"):
        chat.read(tmp_path)


def test_named_templates_and_system_turns(tmp_path):
    values = {
        "bos_token": {"content": "<s>"},
        "chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    assert chat.read(tmp_path) == ("b", {"bos_token": "<s>"})
    assert not chat.takes_system(NO_SYSTEM)
    assert not chat.takes_system("{{ messages[-1].content }}"), "it leaves the system turn out"
    assert chat.takes_system("{% for m in messages %}{{ m.content }}{% endfor %}")


def test_the_server_of_a_judge_says_why_a_template_fails():
    with pytest.raises(ValueError, match="no system turn is allowed"):
        serve.as_text(words(NO_SYSTEM), [chat.SYSTEM, chat.USER])
    assert serve.as_text(words(NO_SYSTEM), [chat.USER]) == f"<user>{chat.USER['content']}<assistant>"
