"""A Hugging Face folder from a GGUF file, by transformers and the packages ``gguf`` and
``accelerate``, which are installed below build/: they are no dependencies."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

from training.errors import ConfigError

PACKAGES = {"gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0"}
"""What is imported -> what pip installs."""
NOT_THE_MODEL_S = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
)


def install(packages: dict[str, str], build: Path) -> None:
    """Make ``packages`` importable; those that are missing are installed into ``build``. Raises
    ConfigError where pip can't."""
    sys.path.insert(0, str(build))
    missing = [package for name, package in packages.items() if importlib.util.find_spec(name) is None]
    if not missing:
        return
    options = ["install", "--quiet", "--upgrade", "--no-deps", "--target", str(build)]
    command = [sys.executable, "-m", "pip", *options, *missing]
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        reason = (pip.stderr.strip() or f"exit code {pip.returncode}").splitlines()[-1]
        raise ConfigError(
            f"pip can't install {' '.join(missing)} ({reason}). Without a network: where there is one, "
            f"`pip download --no-deps --dest wheels {' '.join(missing)}`; here, with that folder, "
            f"`{sys.executable} -m pip install --no-index --no-deps --target {build} wheels/*.whl`, then this again"
        )
    importlib.invalidate_caches()


def read(model_class: type, file: Path) -> tuple[dict, dict, object]:
    """(values for the configuration, state in fp32, tokenizer) of ``file``, whose architecture
    ``model_class`` has."""
    import gguf

    # transformers reads the file three times, and makes the table of names again for each module
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    import torch
    from transformers import AutoTokenizer

    model = model_class.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = {name: value for name, value in model.config.to_dict().items() if name not in NOT_THE_MODEL_S}
    return values, model.state_dict(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def save(model, tokenizer, folder: Path) -> None:
    """Weights in bf16, configuration and tokenizer."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
