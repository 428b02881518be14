"""A client of an OpenAI-compatible chat endpoint: what is asked again, what one refusal, what an
outage.

Nothing that it says or keeps holds the key.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import random
import re
import time
import urllib.error
import urllib.parse
from collections.abc import Callable, Iterator, Mapping

from eval import addresses
from eval.config import MTBenchConfig
from eval.errors import JudgeError
from eval.judge import transport
from eval.judge.budget import CHARACTERS, Budget
from eval.judge.key import Key, read_key
from eval.judge.protocol import Completion

ATTEMPTS = 7
LIMIT_ATTEMPTS = 3
"""Attempts where the reply takes too long or is too large: the next one seldom differs."""
EMPTY_ATTEMPTS = 2
"""Attempts where the judge writes nothing; then it refuses."""
LONGEST_WAIT = 120.0
"""Seconds; a longer Retry-After is cut to this."""
LONGEST_TEXT = 1_000_000
"""Characters of a judgment."""
_TRANSIENT = (408, 409, 425, 429)
_OF_ONE_REQUEST = (400, 413, 422)
"""Statuses that say that this request can't be answered; another one may."""
_UNSUPPORTED = re.compile(
    r"unsupported|not (be )?(supported|allowed|permitted|accepted)|n't support|"
    r"does not (support|accept|allow)|unknown|unrecogni[sz]ed|unexpected|extra|only the default|"
    r"deprecated|no system|instead",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(r"jinja|template", re.IGNORECASE)
_NO_SYSTEM = re.compile(
    r"system\W+(role|prompt|message|turn|instruction)|role\W+system|no system|roles must alternate", re.IGNORECASE
)
_MERGED = "system text in the user's turn"


class _Refused(Exception):
    """This request has no answer: the message is the endpoint's."""


class _Again(Exception):
    """This attempt failed; the next one may not. ``error``: what it is after the last of
    ``attempts``."""

    def __init__(
        self, problem: str, wait: float | None = None, attempts: int = ATTEMPTS, error: type[Exception] = JudgeError
    ):
        super().__init__(problem)
        self.wait, self.attempts, self.error = wait, attempts, error


@contextlib.contextmanager
def open_judge(config: MTBenchConfig, budget: Budget) -> Iterator[Endpoint]:
    """The endpoint at ``judge_url``. Raises JudgeError."""
    yield Endpoint(config, config.judge_url, budget)


class Endpoint:
    """A judge (``eval.judge.protocol``) behind an address."""

    def __init__(
        self,
        config: MTBenchConfig,
        url: str,
        budget: Budget,
        sleep: Callable[[float], object] | None = None,
        key: Key | None = None,
        alive: Callable[[], object] = lambda: None,
        merge_system: bool = False,
    ):
        """``url`` is the base address (".../v1"). Raises JudgeError where the file with the key
        can't be used.

        ``alive`` raises JudgeError where what listens at ``url`` is no longer what was started
        there. ``merge_system``: the judge's template has no system role.
        """
        self.config, self.budget, self.sleep = config, budget, sleep or budget.stopped.wait
        self.url, self.key, self.alive = _completions(url), key or read_key(config), alive
        proxy, variable = addresses.proxy(self.url)
        self.where = self.url
        if proxy:
            self.where += f" (through the proxy {proxy} of {variable}; no_proxy excepts a host)"
        fields = {"temperature": 0, "max_tokens": config.judge_max_tokens} | config.request_fields()
        self.fields = {name: value for name, value in fields.items() if value is not None}
        self.seconds: float = config.judge_seconds
        self.merge_system = merge_system
        self.adapted: list[str] = [_MERGED] if merge_system else []
        """What the judge does not take, and what it is asked instead."""
        self.known_item: tuple[str, str] | None = None
        """The first item that the judge has answered. It tells an endpoint that refuses a request
        from one that answers nothing."""

    def __str__(self) -> str:
        return self.url

    def complete(self, system: str, user: str) -> Completion:
        """The judge's reply.

        Waits and asks again on 429, 5xx, time-outs and broken replies; raises JudgeError on any
        other status, when the budget is used up, and when ``ATTEMPTS`` are. Once the judge has
        shown that it works, what it refuses about a single request is a Completion "refused".
        """
        try:
            completion = self._patiently(system, user)
            self.known_item = self.known_item or (system, user)
            return completion
        except _Refused as refused:
            problem = str(refused)
        if self.known_item is None:
            raise JudgeError(problem)
        try:
            self._patiently(*self.known_item)
        except _Refused as refused:
            raise JudgeError(f"{problem}; an item that the judge rated before is refused now, too: {refused}") from None
        return Completion("", self.config.judge_model, 0, 0, "refused", problem[:1000], tuple(self.adapted))

    def _patiently(self, system: str, user: str) -> Completion:
        attempt = 0
        while True:
            try:
                return self._ask(system, user)
            except _Again as again:
                attempt += 1
                if attempt >= again.attempts:
                    hint = "" if again.error is _Refused else ". Ratings so far are kept: run the stage again to go on"
                    raise again.error(f"{again}; gave up after {attempt} attempts{hint}") from None
                wait = again.wait if again.wait is not None else 2 ** (attempt - 1) * random.uniform(0.5, 1)
            self.sleep(min(LONGEST_WAIT, wait))

    def _ask(self, system: str, user: str) -> Completion:
        """One request; raises _Again, _Refused or JudgeError."""
        reserve, used = self.budget.request(len(system + user)), (0, 0)
        try:
            self.alive()
            reply = transport.send(self.url, self._body(system, user), self._headers(), self.seconds)
            self.alive()
            if reply.status != 200:
                raise self._problem(reply)
            used = reserve  # a broken reply may well be on the bill
            completion = self._completion(reply.body, len(system + user))
            used = completion.tokens_in, completion.tokens_out
            return completion
        except http.client.InvalidURL as error:
            raise JudgeError(self.key.shown(f"{self.url}: {error}; check judge_url")) from None
        except (
            http.client.HTTPException,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            used = (0, 0) if isinstance(error, urllib.error.URLError) else reserve
            problem, attempts = str(error)[:500] or type(error).__name__, ATTEMPTS
            if isinstance(error, (LookupError, TypeError, AttributeError)):
                problem = f"the reply is no chat completion ({type(error).__name__}: {problem})"
            if isinstance(error, transport.LimitError):
                attempts = LIMIT_ATTEMPTS
                problem += "; mtbench.judge_seconds and mtbench.judge_max_tokens set how long it may take"
            raise _Again(self.key.shown(f"{self.where}: {problem}"), attempts=attempts) from None
        finally:
            self.budget.settle(reserve, *used)

    def _body(self, system: str, user: str) -> bytes:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if self.merge_system:
            messages = [{"role": "user", "content": f"{system}\n\n{user}" if system.strip() else user}]
        return json.dumps({"model": self.config.judge_model, "messages": messages} | self.fields).encode()

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key.text}"} if self.key.text else {}
        return {"Content-Type": "application/json"} | key

    def _completion(self, body: bytes, characters: int) -> Completion:
        """The reply's first choice; TypeError, LookupError or ValueError for what is no chat
        completion."""
        reply = json.loads(body)
        if "choices" not in reply and "error" in reply:
            raise ValueError(f"an error instead of a completion: {str(reply['error'])[:300]}")
        choices = reply["choices"]
        choice = choices[0] if choices else {"message": {}}
        message, finish = choice["message"], choice.get("finish_reason")
        text = _text(message.get("content"))
        if not text.strip() and finish != "length" or finish == "content_filter":
            refusal = self.key.shown(str(message.get("refusal") or finish)[: 2**14])[:200]
            raise _Again(f"{self.where}: the judge wrote nothing ({refusal})", attempts=EMPTY_ATTEMPTS, error=_Refused)
        usage = reply.get("usage")
        counted = [
            usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
        ]
        tokens = [
            count if type(count) is int and 0 < count < 10**9 else length // CHARACTERS
            for count, length in zip(counted, (characters, len(text)), strict=True)
        ]
        model = reply.get("model")
        model = model[:200] if isinstance(model, str) and model else self.config.judge_model
        finish = "length" if finish == "length" else "stop"
        return Completion(self.key.clean(text), self.key.clean(model), *tokens, finish, adapted=tuple(self.adapted))

    def _problem(self, reply: transport.Reply) -> Exception:
        """What a status other than 200 means; the message names the setting that may be at
        fault."""
        # cut after, not within, a quoted key
        detail = self.key.shown(reply.body.decode("utf-8", "replace"))[: 2**14]
        detail = " ".join(detail.split())[:300]
        reason = " ".join(self.key.shown(reply.reason).split())[:200]
        status = reply.status
        text = f"{self.where}: HTTP {status} {reason}{self._fix(reply, detail)}" + (f" ({detail})" if detail else "")
        of_template = status == 500 and _TEMPLATE.search(detail)  # some servers' templates fail so
        if self.known_item is None and (status in _OF_ONE_REQUEST or of_template) and self._adapt(detail):
            return _Again(text, 0.0)
        if status in _OF_ONE_REQUEST or of_template:
            return _Refused(text)
        if status in _TRANSIENT or status >= 500:
            return _Again(text, _retry_after(reply.headers))
        return JudgeError(text)

    def _fix(self, reply: transport.Reply, detail: str) -> str:
        if reply.status in (401, 403):
            place = self.key.place
            return f"; check the key in {place}" if self.key.text else f"; {place} is not set: put the key there"
        if reply.status == 404:
            return f"; check judge_url and judge_model = {self.config.judge_model!r}"
        if 300 <= reply.status < 400:
            place = _place(reply.headers.get("Location", ""))
            return f"; it redirects to {place}, and a key is not sent on: set judge_url to the address meant"
        if reply.status in _OF_ONE_REQUEST and (named := [name for name in self.fields if name in detail]):
            return f"; mtbench.judge_request sets or leaves out fields of the request, e.g. '{{\"{named[0]}\": null}}'"
        return ""

    def _adapt(self, detail: str) -> bool:
        """Leave out, rename or move what the endpoint says that it does not take; was there such a
        thing?"""
        if not _UNSUPPORTED.search(detail) and not _NO_SYSTEM.search(detail):
            return False
        if "max_tokens" in detail and "max_tokens" in self.fields:
            self.fields["max_completion_tokens"] = self.fields.pop("max_tokens")
            change = "max_completion_tokens for max_tokens"
        elif "temperature" in detail and "temperature" in self.fields:
            del self.fields["temperature"]
            change = "no temperature: the judge's own"
        elif ("system" in detail.lower() or _NO_SYSTEM.search(detail)) and not self.merge_system:
            self.merge_system, change = True, _MERGED
        else:
            return False
        self.adapted.append(change)
        print(
            f"judge: the endpoint does not take a part of the request; from now on: {change} "
            "(mtbench.judge_request sets fields for good)",
            flush=True,
        )
        return True


def _completions(url: str) -> str:
    """Address of the chat completions below a base address, which may have parameters
    (?api-version=...)."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/")
    path = path if path.endswith("/chat/completions") else path + "/chat/completions"
    return urllib.parse.urlunsplit(parts._replace(path=path, fragment=""))


def _text(content: object) -> str:
    """A message's content: text, nothing, or a list of parts of which those of type "text" are
    said."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    if not isinstance(content, str | None):
        raise TypeError(f"the reply's content is {type(content).__name__}, expected text")
    if len(content or "") > LONGEST_TEXT:
        raise ValueError(f"the reply's content has more than {LONGEST_TEXT:,} characters")
    return content or ""


def _place(location: str) -> str:
    """Scheme and host of an address; its parameters may be secrets."""
    try:
        parts = urllib.parse.urlsplit(location)
        return f"{parts.scheme}://{parts.hostname}{parts.path}"[:200] if parts.hostname else "another path"
    except ValueError:
        return "no address"


def _retry_after(headers: Mapping) -> float | None:
    """Seconds that the header Retry-After asks for, as a number or as a date; None without a usable
    one."""
    value = headers.get("Retry-After", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None  # NaN is no time
