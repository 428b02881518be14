"""A client of an OpenAI-compatible chat endpoint on the standard library: what to retry, what is fatal, and never the key."""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable

ATTEMPTS = 7
LONGEST_WAIT = 120.0
"""Seconds; a longer Retry-After is cut to this."""
TIMEOUT = 180.0
"""Seconds without a byte from the endpoint."""
_TRANSIENT = (408, 409, 425, 429)


class JudgeError(RuntimeError):
    """The judge can't be used: the message names address, cause and fix, and never holds the key."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another address."""

    def redirect_request(self, *_):
        return None


class Endpoint:
    def __init__(self, url: str, model: str, key_variable: str, sleep: Callable[[float], None] = time.sleep):
        """``url`` is the base address (".../v1"); ``key_variable`` names the environment variable with the key, which may be unset."""
        self.url = url.rstrip("/") + "/chat/completions"
        self.model, self.key_variable, self.sleep = model, key_variable, sleep
        self._key = os.environ.get(key_variable, "")
        self._opener = urllib.request.build_opener(_NoRedirects)

    def complete(self, system: str, user: str) -> tuple[str, str]:
        """(text, id of the model as the endpoint returns it), at temperature 0.

        Waits and asks again on 429, 5xx, time-outs and broken replies; raises JudgeError on any other status at once, and when
        ``ATTEMPTS`` are used up.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._ask(system, user)
            except urllib.error.HTTPError as error:
                problem, wait = self._problem(error), _retry_after(error)
                if error.code not in _TRANSIENT and error.code < 500:
                    raise JudgeError(problem) from None
            except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, LookupError, TypeError) as error:
                problem, wait = f"{self.url}: {self._redacted(str(error)) or type(error).__name__}", None
            if attempt + 1 < ATTEMPTS:
                self.sleep(min(LONGEST_WAIT, wait if wait is not None else 2**attempt * random.uniform(0.5, 1)))
        raise JudgeError(f"{problem}; gave up after {ATTEMPTS} attempts. Ratings so far are kept: run the stage again to go on")

    def _ask(self, system: str, user: str) -> tuple[str, str]:
        body = {"model": self.model, "temperature": 0, "max_tokens": 2048,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=TIMEOUT) as response:
            reply = json.loads(response.read())
        text = reply["choices"][0]["message"]["content"]
        if not isinstance(text, str):
            raise TypeError(f"the reply's content is {type(text).__name__}, expected text")
        return text, str(reply.get("model") or self.model)

    def _problem(self, error: urllib.error.HTTPError) -> str:
        """One line for a refused request; it names the variable where the key may be at fault."""
        try:
            detail = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
        except (OSError, http.client.HTTPException):
            detail = ""
        fix = ""
        if error.code in (401, 403):
            fix = f"; check the key in {self.key_variable}" if self._key else f"; {self.key_variable} is not set: put the key there"
        elif error.code == 404:
            fix = f"; check judge_url and judge_model = {self.model!r}"
        return f"{self.url}: HTTP {error.code} {error.reason}{fix}" + (f" ({self._redacted(detail)})" if detail else "")

    def _redacted(self, text: str) -> str:
        """Endpoints quote the key in their messages."""
        return text.replace(self._key, "***") if self._key else text


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
