"""A model's chat template, rendered in a process of its own that has little time and memory.

A template is a program that comes with a model. jinja's sandbox keeps it away from files and from
Python's insides, but not from loops without end, nor from a text as large as the memory.
``render_all`` and ``try_all`` are the only ways to a template. They give what transformers'
``apply_chat_template(..., tokenize=False)`` gives (transformers/utils/chat_template_utils.py).
Training, rollout and evaluation render here, so that their texts can't differ.

Standard library only; jinja2 is imported by the process that renders.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import secrets
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

FILE = "chat_template.jinja"
SECONDS = 5.0
"""Most time that one conversation may take to render."""
MEMORY, TEXT, TEMPLATE = 2**30, 2**22, 2**20
"""Bytes: most memory of the process, longest text that a template may make, longest template."""
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "TZ")
"""What the process has of the environment: no secret that a template could print."""
AT_ONCE = 64
"""Most conversations of one request to the process."""


class TemplateError(ValueError):
    """A template that can't be used, or that refuses a conversation. The message says why, in one
    line; the caller names the folder or the row."""


class Rendered(NamedTuple):
    """The text of one conversation."""

    text: str
    generated: tuple[tuple[int, int], ...] = ()
    """(start, end) in ``text`` of each ``{% generation %}`` block: what the assistant says."""


@dataclass(frozen=True)
class Request:
    """One conversation for a template."""

    messages: Sequence[Mapping]
    """{"role", "content", ...} each, as the row has them."""
    cue: bool = True
    """Add the assistant's mark at the end (``add_generation_prompt``)."""
    tools: Sequence[Mapping] | None = None
    """JSON schemas of the functions that the assistant may call."""
    arguments: Mapping = field(default_factory=dict)
    """More variables for the template, such as Qwen 3's ``enable_thinking``."""


def render_all(template: str, requests: Sequence[Request], tokens: Mapping | None = None) -> Iterator[Rendered]:
    """The text of each request, in order. Raises TemplateError at the first that fails, and for a
    template that is too long."""
    for result in try_all(template, requests, tokens):
        if isinstance(result, TemplateError):
            raise result
        yield result


def try_all(
    template: str, requests: Sequence[Request], tokens: Mapping | None = None
) -> Iterator[Rendered | TemplateError]:
    """``render_all``, with the error of a request in its place."""
    if len(template) > TEMPLATE:
        raise TemplateError(f"the chat template has {len(template):,} characters; expected at most {TEMPLATE:,}")
    for start in range(0, len(requests), AT_ONCE):
        batch = requests[start : start + AT_ONCE]
        done = 0
        while done < len(batch):  # a conversation that kills the process takes only itself with it
            results = _worker.ask({"template": template, "tokens": dict(tokens or {})}, batch[done:])
            yield from results
            done += len(results)


def choose(jinja: str | None, config: Mapping) -> tuple[str, dict[str, str]]:
    """(template, special tokens by name) of a folder; the template is "" where it has none.

    ``jinja``: text of chat_template.jinja, or None. ``config``: tokenizer_config.json. The file
    comes before the configuration's entry; of several named templates "default" counts, as
    transformers has it. Raises TemplateError for an entry of another type.
    """
    template = jinja if jinja is not None else config.get("chat_template") or ""
    if isinstance(template, list):
        named = {
            each.get("name"): each.get("template")
            for each in template
            if isinstance(each, Mapping) and isinstance(each.get("name"), str)
        }
        template = named.get("default", "")
    if not isinstance(template, str):
        raise TemplateError(f"chat_template is {type(template).__name__}; expected a text; correct it")
    tokens = {
        name: value.get("content") if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return template, {name: text for name, text in tokens.items() if isinstance(text, str)}


class _Worker:
    """The process that renders: started when it is needed, ended where it takes too long, and with
    this process."""

    def __init__(self):
        self.lock, self.process, self.received = threading.Lock(), None, b""

    def ask(self, shared: dict, requests: Sequence[Request]) -> list[Rendered | TemplateError]:
        """Results of the first requests, at least one; fewer than all where the process had to
        end."""
        lines = [
            {"messages": list(each.messages), "cue": each.cue, "tools": each.tools, "arguments": dict(each.arguments)}
            for each in requests
        ]
        line = json.dumps(shared | {"requests": lines}).encode() + b"\n"
        results: list[Rendered | TemplateError] = []
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.owner != os.getpid():
                self._start()
            try:
                with contextlib.suppress(BrokenPipeError):  # its answer, or its end, says why
                    self._send(line)
                while len(results) < len(requests):
                    results.append(_result(self._answer()))
            except OSError as error:
                self._end()
                results.append(TemplateError(f"the chat template's process ended ({error}): out of memory?"))
            except TemplateError as error:
                self._end()
                results.append(error)
            except BaseException:
                self._end()
                raise
        return results

    def _send(self, line: bytes) -> None:
        while line:
            line = line[self.process.stdin.write(line) :]

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        code = f"import sys; sys.path.insert(0, {root!r}); from training.files.chat_template import work; work()"
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            bufsize=0,
            stdin=subprocess.PIPE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.owner, self.received = os.getpid(), b""
        self._answer(60)  # that it has started: not the template's time

    def _answer(self, seconds: float | None = None) -> dict:
        seconds = SECONDS if seconds is None else seconds
        deadline, poll = time.monotonic() + seconds, select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        while b"\n" not in self.received:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TemplateError(
                    f"the chat template takes more than {seconds:g} s for one conversation; does it loop without end?"
                )
            block = self.process.stdout.read(1 << 16)
            if not block:
                raise OSError("no answer")
            self.received += block
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
                process.stdout.close()


def _result(answer: dict) -> Rendered | TemplateError:
    if "error" in answer:
        return TemplateError(f"the chat template {answer['error']}")
    return Rendered(answer["text"], tuple((start, end) for start, end in answer["generated"]))


_worker = _Worker()


def work() -> None:
    """The process that renders: a line of JSON with requests in, a line out for each of them,
    until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _compiled("{{ 1 }}")  # jinja is imported before the first template's time begins
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    batches = map(json.loads, sys.stdin.buffer)
    results = (_rendered(batch, request) for batch in batches for request in batch["requests"])
    for answer in itertools.chain([{"text": "ready", "generated": []}], results):
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _rendered(batch: dict, request: dict) -> dict:
    """{"text", "generated"} or {"error"}. Whatever a template raises, be it a TypeError or a
    MemoryError, is the template's."""
    try:
        text = _compiled(batch["template"]).render(
            **{
                "messages": request["messages"],
                "tools": request["tools"],
                "documents": None,
                "add_generation_prompt": request["cue"],
                **batch["tokens"],
                **request["arguments"],
            }
        )
        text, generated = _without_marks(text)
        if len(text) > TEXT:
            return {"error": f"makes {len(text):,} characters of one conversation; expected at most {TEXT:,}"}
        return {"text": text, "generated": generated}
    except Exception as error:
        message = " ".join(str(error).split())[:300] or "no message"
        line = getattr(error, "lineno", None)
        return {"error": f"fails{f' at line {line}' if line else ''}: {type(error).__name__}: {message}"}


_MARKS = secrets.token_hex(16), secrets.token_hex(16)
"""Stand in a rendered text before and after what a ``{% generation %}`` block gives. No message can
hold them: the process that renders makes them itself."""


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks, and (start, end) of what stood between them."""
    before, *blocks = text.split(_MARKS[0])
    spans = []
    for block in blocks:
        generated, _, after = block.partition(_MARKS[1])
        spans.append((len(before), len(before) + len(generated)))
        before += generated + after
    return before, spans


@lru_cache(8)
def _compiled(template: str):
    """In transformers' environment: transformers/utils/chat_template_utils.py,
    _cached_compile_jinja_template."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: what the assistant says, for a mask of the learnt tokens."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            return f"{_MARKS[0]}{caller()}{_MARKS[1]}"

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
