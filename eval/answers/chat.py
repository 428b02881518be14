"""A model's chat template, rendered in a process of its own that has little time and memory.

A template is a program that comes with a model. jinja's sandbox keeps it away from files and from
Python's insides, but not from loops without end, nor from a text as large as the memory. ``render``
is the only way to a template; it gives what transformers' ``apply_chat_template(...,
tokenize=False)`` gives.

``python -m eval.answers.chat FOLDER``: does the folder's template render a conversation? Exit
status 65 and one line where not.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from eval.errors import DataError
from eval.files import foreign

SECONDS = 5.0
"""Most time that one conversation may take to render."""
MEMORY, TEXT, TEMPLATE = 2**30, 2**22, 2**20
"""Bytes: most memory of the process, longest text that a template may make, longest template."""
JSON_MAX = 2**23
"""Bytes of the largest tokenizer_config.json that is read."""
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TZ")
"""What the process has of the environment: no secret that a template could print."""
USER, ASSISTANT = {"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}
TRIAL = ([USER], [USER, ASSISTANT, USER])
"""What the evaluation asks: one turn, and two."""
SYSTEM = {"role": "system", "content": "You are a judge."}


class TemplateError(DataError):
    """A template that can't be used: the message says why, in one line; the caller names the
    folder."""


def render(template: str, messages: Sequence[Mapping], tokens: Mapping | None = None, cue: bool = True) -> str:
    """The text of ``messages`` ({"role", "content"} each). ``tokens``: {"bos_token": "<s>", ...};
    ``cue``: the assistant's mark is added at the end. May be called from several threads. Raises
    TemplateError."""
    if len(template) > TEMPLATE:
        raise TemplateError(f"the chat template has {len(template):,} characters; expected at most {TEMPLATE:,}")
    return _worker.ask({"template": template, "messages": list(messages), "tokens": dict(tokens or {}), "cue": cue})


def read(folder: str | Path) -> tuple[str, dict[str, str]]:
    """(template, special tokens by name) of a Hugging Face folder; the template is "" where it has
    none.

    chat_template.jinja comes before tokenizer_config.json's, of several named ones "default"
    counts, as transformers has it. Raises TemplateError for damaged files.
    """
    folder, values = Path(folder), {}
    config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if config.exists():
        try:
            values = json.loads(_text(config, JSON_MAX))
        except (ValueError, RecursionError) as error:
            raise TemplateError(f"{config} can't be read as JSON ({error}); download it again") from None
        if not isinstance(values, dict):
            raise TemplateError(f"{config} holds no JSON object; download it again")
    template = _text(file, TEMPLATE) if file.exists() else values.get("chat_template") or ""
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template")
            for each in template
            if isinstance(each, dict) and isinstance(each.get("name"), str)
        }
        template = named.get("default", "")
    if not isinstance(template, str):
        raise TemplateError(f"{config}: chat_template is {type(template).__name__}; expected a text; correct it")
    tokens = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in values.items()
        if name.endswith("_token")
    }
    return template, {name: text for name, text in tokens.items() if isinstance(text, str)}


def render_by(tokenizer, messages: Sequence[Mapping]) -> str:
    """``render`` by a transformers tokenizer's own template, with the assistant's mark. Raises
    TemplateError."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if not isinstance(template, str):
        raise TemplateError("the tokenizer has no chat template that is called default")
    return render(template, messages, tokenizer.special_tokens_map)


def check(folder: str | Path) -> str:
    """That the folder's template renders, in words. Raises TemplateError where it has none, or it
    fails."""
    template, tokens = read(folder)
    if not template:
        raise TemplateError(f"{folder}: its tokenizer has no chat template")
    for messages in TRIAL:
        try:
            text = render(template, messages, tokens)
        except TemplateError as error:
            raise TemplateError(f"{folder}: {error}") from None
        if any(message["content"] not in text for message in messages):
            raise TemplateError(
                f"{folder}: the chat template leaves out what was said: {messages} gives {text[:200]!r}"
            )
    return f"{folder}: its chat template renders"


def takes_system(template: str, tokens: Mapping | None = None) -> bool:
    """Does a system turn's text reach the model? Some templates refuse it (Gemma's), some leave it
    out."""
    try:
        return SYSTEM["content"] in render(template, [SYSTEM, USER], tokens)
    except TemplateError:
        return False


def _text(path: Path, most: int) -> str:
    """The file's text. Raises TemplateError for what is no file, too large, or no UTF-8."""
    try:
        return foreign.content(path, most).decode()
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path} is no UTF-8 (byte {error.start}); download it again") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TemplateError(f"{path} can't be read ({reason}): expected the file of a tokenizer") from None


class _Worker:
    """The process that renders: started when it is needed, ended where it takes too long, and with
    this process."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def ask(self, question: dict) -> str:
        line = json.dumps(question).encode() + b"\n"
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self._start()
            try:
                self.process.stdin.write(line)
                answer = self._answer()
            except BaseException as error:
                self._end()
                if isinstance(error, OSError):
                    raise TemplateError(f"the chat template's process ended ({error}): out of memory?") from None
                raise
        if "error" in answer:
            raise TemplateError(f"the chat template {answer['error']}")
        return answer["text"]

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from eval.answers.chat import work; work()"
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            bufsize=0,
            stdin=subprocess.PIPE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.owner = os.getpid()
        self._answer(60)  # that it has started: not the template's time

    def _answer(self, seconds: float = SECONDS) -> dict:
        deadline, line, poll = time.monotonic() + seconds, bytearray(), select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while not line.endswith(b"\n"):
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TemplateError(
                    f"the chat template takes more than {seconds:g} s for one conversation; does it loop without end?"
                )
            block = self.process.stdout.read(1 << 16)
            if not block:
                raise OSError("no answer")
            line += block
        return json.loads(line)

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
                process.stdout.close()


_worker = _Worker()


def work() -> None:
    """The rendering process: one JSON line in, one out, until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _compiled("{{ 1 }}")  # jinja is imported before the first template's time begins
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    for answer in itertools.chain([{"text": "ready"}], (_rendered(json.loads(line)) for line in sys.stdin.buffer)):
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _rendered(question: dict) -> dict:
    """{"text"} or {"error"}: whatever a template raises, be it a TypeError or a MemoryError, is the
    template's."""
    try:
        text = _compiled(question["template"]).render(
            messages=question["messages"],
            tools=None,
            documents=None,
            add_generation_prompt=question["cue"],
            **question["tokens"],
        )
        if len(text) > TEXT:
            return {"error": f"makes {len(text):,} characters of one conversation; expected at most {TEXT:,}"}
        return {"text": text}
    except Exception as error:
        words = " ".join(str(error).split())[:300] or "no message"
        line = getattr(error, "lineno", None)
        return {"error": f"fails{f' at line {line}' if line else ''}: {type(error).__name__}: {words}"}


@lru_cache(8)
def _compiled(template: str):
    """In transformers' environment: transformers/utils/chat_template_utils.py,
    _cached_compile_jinja_template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the assistant's words for a mask that nothing asks for."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

        def _as_it_is(self, caller):
            return caller()

    def refuse(message):
        raise jinja2.TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda format: time.strftime(str(format))
    return environment.from_string(template)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m eval.answers.chat", description="Does a folder's chat template render a conversation?"
    )
    parser.add_argument("folder", help="Hugging Face folder of a model with a chat template")
    try:
        print(check(parser.parse_args(arguments).folder))
    except TemplateError as error:
        print(error, file=sys.stderr)
        return os.EX_DATAERR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
