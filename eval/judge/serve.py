"""``python -m eval.judge.serve FOLDER --port P``: a small OpenAI-compatible server of one Hugging
Face model on loopback, greedy.

For a judge inside the allocation where vLLM is not installed. What comes in while the model is busy
is answered together as the next batch. GET /health, GET /v1/models, POST /v1/chat/completions.
Where the environment variable CONVOY_JUDGE_KEY is set, requests below /v1 must bear it as their
key: other users of the machine can reach the port, too.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import queue
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from eval.addresses import is_loopback
from eval.answers import chat, generation
from eval.answers.generation import Prompt, Reply

BATCH = 8
"""Most requests answered together."""
LARGEST = 16 << 20
"""Bytes of the longest request."""
IDLE_S = 600
"""Seconds after which a connection that says nothing is closed."""
KEY_VARIABLE = "CONVOY_JUDGE_KEY"


class Batcher:
    """One thread owns the model; ``reply`` may be called from many."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.context = (
            getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "seq_length", None) or 8192
        )
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def reply(self, text: str, max_tokens: int) -> tuple[Reply, int]:
        """(reply, tokens of the prompt); ValueError for a prompt that leaves no room for one."""
        sent = len(generation.encode(self.tokenizer, text, sys.maxsize))
        if sent >= self.context:
            raise ValueError(f"the prompt has {sent} tokens, the model's context {self.context}")
        future: Future = Future()
        self.waiting.put((text, min(max_tokens, self.context - sent), future))
        return future.result(), sent

    def _run(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get())
            texts, limits, futures = zip(*batch, strict=True)
            try:
                replies = generation.generate(
                    self.model,
                    self.tokenizer,
                    [Prompt(text, 0.0, "") for text in texts],
                    max_new_tokens=max(limits),
                    context_length=sys.maxsize,
                    seed=0,
                    stop=(),
                )
                for future, reply in zip(futures, replies, strict=True):
                    future.set_result(reply)
            except (
                Exception
            ) as error:  # out of memory, say: those who wait must hear it, whatever it is, and the next batch may fit
                for future in futures:
                    if not future.done():
                        future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))


def as_text(tokenizer, messages: list[dict]) -> str:
    """By the tokenizer's chat template; without one as plain text in the Human/Assistant form."""
    if tokenizer.chat_template:
        return chat.render_by(tokenizer, messages)
    speakers = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    return "".join(speakers[message["role"]] + message["content"] for message in messages) + "\n\nAssistant:"


def parse_request(body: bytes) -> tuple[list[dict], int]:
    """(messages, most tokens) of a request; ValueError says what is wrong with it."""
    try:
        request = json.loads(body)
    except RecursionError:
        raise ValueError("brackets too deep") from None
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list) or not request["messages"]:
        raise ValueError('expected an object with "messages"')
    for message in request["messages"]:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ("system", "user", "assistant")
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError('messages: expected {"role": "system", "user" or "assistant", "content": text} each')
    tokens = next(
        (request[name] for name in ("max_completion_tokens", "max_tokens") if request.get(name) is not None), 1024
    )
    if type(tokens) is not int or tokens < 1:
        raise ValueError(f"max_tokens = {tokens!r:.80}: expected a whole number above 0")
    return request["messages"], tokens


def handler(batcher: Batcher, name: str, key: str = "") -> type[BaseHTTPRequestHandler]:
    """``key``: what requests below /v1 must bear; "" for none."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_S

        def allowed(self) -> bool:
            """Has the caller the key? Else it is told so."""
            sent_key = self.headers.get("Authorization", "").encode("latin-1", "replace")
            if not key or hmac.compare_digest(sent_key, f"Bearer {key}".encode()):
                return True
            self.close_connection = True  # its body is not read
            self.send(401, {"error": {"message": "the key is missing or wrong"}})
            return False

        def do_GET(self):
            if self.path == "/health":
                self.send(200, {})
            elif self.path == "/v1/models" and self.allowed():
                self.send(200, {"object": "list", "data": [{"id": name, "object": "model"}]})
            elif self.path != "/v1/models":
                self.send(404, {"error": {"message": f"no {self.path} here"}})

        def do_POST(self):
            length = self.headers.get("Content-Length", "")
            if not self.allowed():
                return None
            if not length.isascii() or not length.isdigit() or int(length[:12]) > LARGEST:
                self.close_connection = True
                return self.send(413, {"error": {"message": f"Content-Length: expected at most {LARGEST}"}})
            body = self.rfile.read(int(length))
            if self.path != "/v1/chat/completions":
                return self.send(404, {"error": {"message": f"no {self.path} here"}})
            try:
                messages, most = parse_request(body)
                reply, sent = batcher.reply(as_text(batcher.tokenizer, messages), most)
            except (ValueError, KeyError, TypeError) as error:
                return self.send(400, {"error": {"message": f"bad request: {type(error).__name__}: {error}"}})
            except RuntimeError as error:  # the client decides whether to ask again
                return self.send(500, {"error": {"message": str(error)}})
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": "length" if reply.finish == "length" else "stop",
            }
            self.send(
                200,
                {
                    "object": "chat.completion",
                    "model": name,
                    "choices": [choice],
                    "usage": {
                        "prompt_tokens": sent,
                        "completion_tokens": len(reply.tokens),
                        "total_tokens": sent + len(reply.tokens),
                    },
                },
            )

        def send(self, status: int, value: dict) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    return Handler


def end_with_parent() -> None:
    """Leave as soon as standard input is closed: whoever started this has ended, however that came
    about."""
    sys.stdin.buffer.read()
    os._exit(0)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.judge.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="Hugging Face folder: config.json, tokenizer, weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0: a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--end-with-stdin", action="store_true", help="end when standard input is closed: it never outlives its parent"
    )
    options = parser.parse_args(arguments)
    key = os.environ.pop(KEY_VARIABLE, "")
    batcher = Batcher(*generation.load(options.folder))
    server = ThreadingHTTPServer((options.host, options.port), handler(batcher, options.folder, key))
    if not key and not is_loopback(options.host):
        print(
            f"warning: whoever reaches {options.host} can use this server; {KEY_VARIABLE} sets a key that it asks for",
            flush=True,
        )
    if options.end_with_stdin:
        threading.Thread(target=end_with_parent, daemon=True).start()
    print(f"serving {options.folder} at http://{options.host}:{server.server_port}/v1", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
