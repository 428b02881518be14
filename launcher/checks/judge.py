"""Is what the evaluation's judge needs there? Asked before anything is queued: the judge comes
after all training."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from eval.addresses import is_loopback
from eval.config import MTBenchConfig
from eval.errors import JudgeError
from eval.judge.key import read_key
from launcher.config import key_file
from launcher.config.profile import Profile
from training.errors import ConfigError


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
        try:
            read_key(config)
        except JudgeError as error:
            raise ConfigError(str(error)) from None
        return ""
    name, url = config.judge_key_variable, urlsplit(config.judge_url)
    if is_loopback(url.hostname or "") or name in key_file.names(profile):
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
