"""One HTTP request with limits of size and time, without redirects, and without a proxy for this
machine itself.

By urllib: httpx limits each read, not the whole reply, so that a server that sends a byte now and
then keeps it waiting; the watch below would stay, and the dependency would save few lines.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from eval.addresses import is_loopback

LARGEST = 4 << 20
"""Bytes of the longest reply that is read; a judgment has some thousands."""
CONNECT_S = 30.0
"""Seconds until a connection stands."""


class Reply(NamedTuple):
    status: int
    reason: str
    headers: Mapping
    body: bytes


class LimitError(OSError):
    """The reply was too long or took too long: the message says which limit."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like another: following it would hand the key to another address."""

    def redirect_request(self, *_):
        return None


class _Watch:
    """Cuts the connection when the time is up: a peer that sends a byte now and then never times
    out by itself."""

    def __init__(self, seconds: float):
        self.seconds, self.expired = seconds, False
        self.connections: list = []
        self.timer = threading.Timer(seconds, self._cut)
        self.timer.daemon = True

    def _cut(self) -> None:
        self.expired = True
        for connection in self.connections:
            # urllib takes the first away once headers are there
            for end in (connection.sock, connection.established):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    end.shutdown(socket.SHUT_RDWR)

    def connection(self, kind: type):
        """A class of connections like ``kind`` that this can cut."""
        watch = self

        class Watched(kind):
            established = None

            def connect(self):
                watch.connections.append(self)
                self.timeout = min(CONNECT_S, watch.seconds)
                super().connect()
                self.established = self.sock
                self.sock.settimeout(watch.seconds)

        return Watched


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def http_open(self, request):
        return self.do_open(self.watch.connection(http.client.HTTPConnection), request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def https_open(self, request):
        return self.do_open(self.watch.connection(http.client.HTTPSConnection), request, context=self._context)


def send(url: str, body: bytes | None, headers: Mapping[str, str], seconds: float) -> Reply:
    """POST ``body`` (None: GET); any status is a Reply.

    Raises LimitError, OSError (URLError is one), http.client.HTTPException and ValueError (an
    address that is none). ``seconds`` are for everything after the connection.
    """
    watch = _Watch(seconds)
    direct = [urllib.request.ProxyHandler({})] if is_loopback(urllib.parse.urlsplit(url).hostname or "") else []
    opener = urllib.request.build_opener(_NoRedirects, _Plain(watch), _Secure(watch), *direct)
    watch.timer.start()
    try:
        try:
            with opener.open(urllib.request.Request(url, body, dict(headers)), timeout=seconds) as response:
                return Reply(response.status, response.reason, response.headers, _all_of(response, watch))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, str(error.reason), error.headers, _beginning_of(error))
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        if watch.expired or isinstance(error, TimeoutError):
            raise LimitError(f"no whole reply within {seconds:g} s") from None
        if isinstance(error, AttributeError):
            raise OSError(f"broken connection ({error})") from None
        raise
    finally:
        watch.timer.cancel()


def _all_of(response, watch: _Watch) -> bytes:
    body = response.read(LARGEST + 1)
    if watch.expired:  # a connection that is cut looks like one that ended
        raise TimeoutError
    if len(body) > LARGEST:
        raise LimitError(f"the reply is longer than {LARGEST >> 20} MiB")
    if response.length:  # fewer bytes than were announced
        raise http.client.IncompleteRead(body, response.length)
    return body


def _beginning_of(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(2**16)
    except (OSError, http.client.HTTPException):
        return b""
