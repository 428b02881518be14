"""Addresses: the secrets that must not stand in one, and whether a proxy lies on the way. Standard
library only."""

from __future__ import annotations

import re
import urllib.parse

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{0,30}://\S*", re.IGNORECASE)
_BARE_LOGIN = re.compile(r"[^/\s:@]+:[^/\s@]+@[^/\s@]+")
_SECRET_NAME = re.compile(
    r"key|token|secret|passw|pwd|auth|credential|bearer|jwt|signature|session|"
    r"(^|[^a-z])(sig|sas|pw|pass)([^a-z]|$)",
    re.IGNORECASE,
)
_SECRET_FIELD = re.compile(
    r"(^|[_-])(api[_-]?key|secret([_-]key)?|password|passwd|authorization|bearer|jwt|credentials?|"
    r"(api|auth|access|refresh|id)[_-]?token)$|^(key|token)$",
    re.IGNORECASE,
)
_NOT_SECRET = re.compile(r"keyboard|monkey|author(s|ity)?$|tokenizer|max_.*tokens|.*_tokens$", re.IGNORECASE)


def secret(text: str, is_address: bool = False) -> str:
    """Which secret the addresses in ``text`` hold, in words that don't quote it; "" for none.

    ``is_address``: the text is one address, and may lack its scheme.
    """
    addresses = [text] if is_address and "://" in text else [match[0] for match in _ADDRESS.finditer(text)]
    if is_address and not addresses and _BARE_LOGIN.match(text.strip()):
        return "a user name and password before an @"
    return next(filter(None, map(_secret, addresses)), "")


def refuse_secret(field: str, text: str, instead: str, is_address: bool = True) -> None:
    """ValueError where the address holds a secret: it would be written into configurations, logs
    and reports."""
    if what := secret(text, is_address):
        raise ValueError(
            f"{field}: the address holds {what}, which would be written into config.json, logs and the "
            f"report; take it out and {instead}"
        )


def _secret(address: str) -> str:
    scheme, _, rest = address.partition("://")
    login = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = login.rpartition(":")[2] if ":" in login and not login.endswith("]") else ""
    if "@" in login or port and not port.isdigit() and "@" in rest:  # a password may hold a slash
        return "a user name or password before an @"
    names = [name for part in re.split(r"[?#]", rest)[1:] for name in re.split(r"[&;]", part)]
    for name in (urllib.parse.unquote(name.partition("=")[0]) for name in names if "=" in name):
        if is_secret_name(name):
            return f"the parameter {name[:40]!r}"
    return ""


def is_secret_name(name: str) -> bool:
    """Does an address's parameter of this name hold a key, a token or a password?"""
    return bool(_SECRET_NAME.search(name)) and not _NOT_SECRET.match(name)


def is_secret_field(name: str) -> bool:
    """The same of a field of a request, where "stop_token_ids" and "prompt_cache_key" are usual."""
    return bool(_SECRET_FIELD.search(name))


def is_loopback(host: str) -> bool:
    """Is this the machine itself? In every way to write it: 127.1, ::ffff:127.0.0.1,
    judge.localhost."""
    import ipaddress
    import socket

    host = host.lower().rstrip(".").strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback or (mapped or address).is_unspecified


def proxy(url: str) -> tuple[str, str]:
    """(the proxy that requests to ``url`` go through, without its password, its variable); ("", "")
    for none.

    No proxy is asked for this machine itself, whatever the environment says.
    """
    import urllib.request  # late, as above: the launcher's --help imports this file

    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    direct = is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc)
    if not proxy or direct:
        return "", ""
    return re.sub(r"^(\w+://)?[^/]*@", r"\1", proxy), f"{parts.scheme}_proxy"
