"""Addresses in a configuration or a profile: none may hold a login, a key or a token. Standard
library only.

Both are written into the run's folder, scripts, logs and the report, so this comes before anything
is written. What counts as a secret: eval/addresses.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from eval.addresses import secret
from training.errors import ConfigError

_KEYS_OF_ADDRESSES = re.compile(r"(^|_)(url|uri|address|endpoint)$|^mlflow$", re.IGNORECASE)
INSTEAD = {
    "mtbench.judge_url": "put the key into the variable that mtbench.judge_key_variable names, or into "
    "mtbench.judge_key_file",
    "mlflow": "put it into MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN (profile: "
    "secrets)",
    "": "put it into the file that the profile's secrets name",
}


def refuse_secrets(tables: dict, prefix: str = "") -> None:
    """ConfigError, which does not quote it, for the first text in ``tables`` with a secret in an
    address."""
    for key, text in _texts(tables, prefix):
        name = key.rpartition(".")[2]
        if what := secret(text, is_address=bool(_KEYS_OF_ADDRESSES.search(name))):
            instead = INSTEAD.get(key) or INSTEAD.get(name) or INSTEAD[""]
            raise ConfigError(
                f"{key}: the address holds {what}, which would be written into the run's configuration, scripts and "
                f"report; take it out and {instead}"
            )


def _texts(value, key: str) -> Iterator[tuple[str, str]]:
    """(key, text) of every text in ``value``."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _texts(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each, key)
