"""Is what the evaluation's judge needs there? Asked before anything is queued: the judge comes
after all training."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import urlsplit

from eval.config import MTBenchConfig
from launcher.config import key_file
from launcher.config.profile import Profile
from training.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_judge(config: MTBenchConfig, profile: Profile) -> str:
    """A warning, or ""; ConfigError where the judge's folder or key is not there."""
    kind = config.judge_kind
    if kind is None:
        return ""
    if kind.model_is_folder and not (Path(config.judge_model) / "config.json").is_file():
        raise ConfigError(
            f"mtbench.judge_model = {config.judge_model!r}: {Path(config.judge_model) / 'config.json'} does not exist; "
            f'judge = "{config.judge}" needs the Hugging Face folder of the judge\'s model: '
            "--set mtbench.judge_model=FOLDER"
        )
    if not kind.hosted:
        return ""
    if config.judge_key_file:
        _check_file(config.judge_key_file)
        return ""
    name, url = config.judge_key_variable, urlsplit(config.judge_url)
    if url.hostname in LOOPBACK or name in key_file.names(profile):
        return ""
    key = os.environ.get(name, "").strip()
    if not key and url.scheme == "https":
        raise ConfigError(
            f'mtbench.judge = "{config.judge}" at {config.judge_url} without a key: the variable {name} '
            "(judge_key_variable) is not set; put it into the file that the profile's secrets name, or give "
            "--set mtbench.judge_key_file=FILE"
        )
    if not key:
        return f"mtbench.judge_url = {config.judge_url}: {name} is not set; the judge is asked without a key"
    return ""


def _check_file(name: str) -> None:
    field = f"mtbench.judge_key_file = {name!r}"
    try:
        status = Path(name).expanduser().stat()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"{field}: {getattr(error, 'strerror', None) or error}; expected a file that holds the key and nothing else"
        ) from None
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        raise ConfigError(
            f"{field}: {'empty' if stat.S_ISREG(status.st_mode) else 'not a file'}; "
            "expected one that holds the key and nothing else"
        )
    if status.st_mode & 0o077:
        raise ConfigError(f"{field}: others may read it (mode {stat.S_IMODE(status.st_mode):03o}); chmod 600 {name}")
