"""A client of an OpenAI-compatible chat endpoint on the standard library: what to retry, what is fatal, and never the key."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import re
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from eval.budget import CHARACTERS, Budget
from eval.config import MTBenchConfig
from eval.errors import JudgeError

ATTEMPTS = 7
LONGEST_WAIT = 120.0
"""Seconds; a longer Retry-After is cut to this."""
TIMEOUT = 180.0
"""Seconds without a byte from the endpoint."""
_TRANSIENT = (408, 409, 425, 429)
_PLACEHOLDER = 8
"""Characters; a shorter key (EMPTY, none) is no secret, and its letters may well stand in a judgment."""


class Completion(NamedTuple):
    text: str
    model: str
    """Id of the model as the endpoint returns it: an alias drifts."""
    tokens_in: int
    tokens_out: int
    """As the endpoint counts them; where it doesn't, from the length of the text."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another address."""

    def redirect_request(self, *_):
        return None


class Endpoint:
    def __init__(self, config: MTBenchConfig, url: str, budget: Budget, sleep: Callable[[float], object] | None = None):
        """``url`` is the base address (".../v1"). Raises JudgeError where the file with the key can't be used."""
        self.config, self.budget, self.sleep = config, budget, sleep or budget.stopped.wait
        self.url = url.rstrip("/") + "/chat/completions"
        self._key, self.key_place = read_key(config)
        self._quoted = re.compile("".join(rf"(?:\\*{re.escape(c)}|(?i:\\+u{ord(c):04x}|%{ord(c):02x}))" for c in self._key))
        self._opener = urllib.request.build_opener(_NoRedirects)

    def complete(self, system: str, user: str) -> Completion:
        """The judge's reply at temperature 0.

        Waits and asks again on 429, 5xx, time-outs and broken replies; raises JudgeError on any other status at once, when the budget
        is used up, and when ``ATTEMPTS`` are.
        """
        for attempt in range(ATTEMPTS):
            reserve, used = self.budget.request(len(system + user)), (0, 0)
            try:
                made = self._ask(system, user)
                used = made.tokens_in, made.tokens_out
                return made
            except urllib.error.HTTPError as error:
                problem, wait = self._problem(error), _retry_after(error)
                if error.code not in _TRANSIENT and error.code < 500:
                    raise JudgeError(problem) from None
            except http.client.InvalidURL as error:
                raise JudgeError(self.redacted(f"{self.url}: {error}; check judge_url")) from None
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                problem, wait = self.redacted(f"{self.url}: {str(error) or type(error).__name__}"), None
                if not isinstance(error, urllib.error.URLError):
                    used = reserve  # a broken reply or none in time: it may well be on the bill
            finally:
                self.budget.settle(reserve, *used)
            if attempt + 1 < ATTEMPTS:
                self.sleep(min(LONGEST_WAIT, wait if wait is not None else 2**attempt * random.uniform(0.5, 1)))
        raise JudgeError(f"{problem}; gave up after {ATTEMPTS} attempts. Ratings so far are kept: run the stage again to go on")

    def _ask(self, system: str, user: str) -> Completion:
        model = self.config.judge_model
        body = {"model": model, "temperature": 0, "max_tokens": self.config.judge_max_tokens,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=TIMEOUT) as response:
            reply = json.loads(response.read())
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"the reply's content is {type(text).__name__}, expected text")
        usage = reply.get("usage")
        counted = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
        tokens = [count if type(count) is int and 0 < count < 10**9 else length // CHARACTERS
                  for count, length in zip(counted, (len(system + user), len(text)), strict=True)]
        return Completion(self._clean(text), self._clean(str(reply.get("model") or model)), *tokens)

    def _problem(self, error: urllib.error.HTTPError) -> str:
        """One line for a refused request; it names the place where the key is taken from where that may be at fault."""
        try:
            detail = self.redacted(error.read(2**16).decode("utf-8", "replace"))[:2**14]  # cut after, not within, a quoted key
            detail = " ".join(detail.split())[:300]
        except (OSError, http.client.HTTPException):
            detail = ""
        fix = ""
        if error.code in (401, 403):
            fix = f"; check the key in {self.key_place}" if self._key else f"; {self.key_place} is not set: put the key there"
        elif error.code == 404:
            fix = f"; check judge_url and judge_model = {self.config.judge_model!r}"
        said = " ".join(self.redacted(str(error.reason)).split())[:200]
        return self.redacted(f"{self.url}: HTTP {error.code} {said}{fix}" + (f" ({detail})" if detail else ""))

    def redacted(self, text: str) -> str:
        """Endpoints quote the key in their messages: as it is, or with JSON's, Python's or an address's escapes."""
        return self._quoted.sub("***", text) if self._key else text

    def _clean(self, text: str) -> str:
        """A reply as it may be kept: without the key, and with U+FFFD for half a character (no file of UTF-8 can hold one)."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.redacted(text) if len(self._key) >= _PLACEHOLDER else text


def read_key(config: MTBenchConfig) -> tuple[str, str]:
    """(key, where it is from): the file, which must be its owner's alone, or the environment variable, which may be unset.

    Raises JudgeError for a key that no HTTP header can hold: the library's own error would quote it.
    """
    if not config.judge_key_file:
        key, place = os.environ.get(config.judge_key_variable, "").strip(), config.judge_key_variable
    else:
        key, place = _key_of_file(config.judge_key_file)
    if not all("!" <= character <= "~" for character in key):
        raise JudgeError(f"{place}: expected the key and nothing else: visible ASCII characters, no space or line break within")
    return key, place


def _key_of_file(name: str) -> tuple[str, str]:
    field = f"mtbench.judge_key_file = {name}"
    try:
        path = Path(name).expanduser()
        mode, key = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise JudgeError(f"{field}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise JudgeError(f"{field}: not UTF-8; expected the key and nothing else") from None
    except RuntimeError as error:  # ~nobody
        raise JudgeError(f"{field}: {error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise JudgeError(f"{field}: not its owner's alone (mode {stat.S_IMODE(mode):o}); chmod 600 {path}")
    if not key:
        raise JudgeError(f"{field}: empty; expected the key and nothing else")
    return key, str(path)


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    """Seconds that the header Retry-After asks for, given as seconds or as a date; None without a usable header."""
    value = error.headers.get("Retry-After", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
