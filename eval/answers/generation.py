"""Replies of a Hugging Face causal LM: batched, left-padded, and one row's reply does not depend on
its neighbours.

Each row has its own temperature and its own stream of random numbers, named by a key. A token is
drawn by inverting the cumulative distribution at one uniform number a step; the numbers come from
the CPU, so that they are the same on every device, and models asked with the same key share them,
which makes paired differences between models less noisy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
    StoppingCriteria,
)
from transformers.utils import logging

from eval.error_report import NUMBERS
from eval.errors import DataError, InvariantError
from eval.files import foreign


@dataclass(frozen=True)
class Prompt:
    text: str
    temperature: float
    """0 = greedy."""
    key: str
    """Names the row's random numbers."""
    is_chat: bool = False
    """The text is a chat template's, which writes BOS itself where there is one."""


@dataclass(frozen=True)
class Reply:
    text: str
    """What stands before the end-of-sequence token or the stop string, as generated."""
    tokens: list[int]
    """Generated ids, the end-of-sequence token or the stop string's tokens included."""
    finish: str
    """"eos", "stop" (a stop string) or "length"."""


def device() -> torch.device:
    """This rank's GPU (of those that it sees), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def require_model(folder: str | Path, field: str) -> None:
    """Raise DataError unless ``folder`` looks like a Hugging Face model; ``field`` names it in the
    configuration."""
    place, expected = (
        Path(folder),
        "expected a Hugging Face folder: config.json, tokenizer, weights; for a run's model, run export first",
    )
    if not (place / "config.json").is_file():
        raise DataError(f"{field} = {folder}: no config.json there; {expected}")
    try:
        values = foreign.parse(foreign.read(place / "config.json", foreign.TABLE))
        known = isinstance(values, dict) and isinstance(values.get("model_type"), str)
    except (ValueError, OSError):
        known = False
    if not known:
        raise DataError(f"{field} = {folder}: its config.json names no model_type; {expected}")
    for what, patterns in (("tokenizer", ("tokenizer*", "*.model", "vocab*")), ("weights", ("*.safetensors", "*.bin"))):
        if not any(file for pattern in patterns for file in place.glob(pattern)):
            raise DataError(f"{field} = {folder}: no {what} there ({', '.join(patterns)}); {expected}")
    require_files(folder)


def require_files(folder: str | Path) -> None:
    """Raise DataError for a pipe or a device in the folder, which transformers would wait for or
    read without end."""
    for path in Path(folder).glob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise DataError(f"{path} is a pipe or a device, no file of a model; remove it")


@contextlib.contextmanager
def readable(folder: str | Path, kind: str = ""):
    """Whatever transformers raises of a folder becomes a DataError that names it: each library has
    errors of its own, and a panic of tokenizers is not even an ``Exception``."""
    require_files(folder)
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # torn weights, an unknown model_type, no usable tokenizer
        if not folders_fault(error):
            raise
        reason = foreign.plain((str(error).strip() or "no message").splitlines()[0][:300])
        code = (
            "; code in a model's folder is never run (trust_remote_code is always False)"
            if "trust_remote_code" in str(error)
            else ""
        )
        raise DataError(
            f"{folder}: transformers can't load it{kind}: {type(error).__name__}: {reason}{code}"
        ) from error


def load(folder: str | Path, fp32: bool = False):
    """(model, tokenizer) from a Hugging Face folder, in evaluation mode on the accelerator if there
    is one.

    Weights keep the dtype of the file on CUDA; ``fp32``, and every CPU, computes in float32. Raises
    DataError for a folder that can't be loaded.
    """
    logging.disable_progress_bar()  # a log holds plain lines
    with readable(folder):
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json"
            )
        dtype = torch.float32 if fp32 or device().type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    if getattr(model.config, "auto_map", None):
        print(
            f"{folder}: brings code of its own, which is never run: transformers' {type(model).__name__} is used",
            flush=True,
        )
    model = model.to(device()).eval()
    # a folder's own sampling defaults (top_p, penalties) must not leak in
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model, tokenizer


def load_tokenizer(folder: str | Path):
    """tokenizer.json as it is, which training goes by: the class that the files name may make other
    ids of it (GPT2Tokenizer leaves out its pre_tokenizer). AutoTokenizer where there is none. No
    code of the folder is run."""
    kind = PreTrainedTokenizerFast if (Path(folder) / "tokenizer.json").is_file() else AutoTokenizer
    return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def stops(model, tokenizer) -> list[int]:
    """Tokens that end a reply: the tokenizer's EOS, and those that the model's
    generation_config.json names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(number for number in named if type(number) is int)]))


def folders_fault(error: BaseException) -> bool:
    """Whether a library's error in loading a folder can be the folder's fault: not memory that is
    full, a disk or a GPU that fails, or a library that can't be imported."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | ImportError | AssertionError) or "CUDA" in str(error):
        return False
    refused = (*NUMBERS, errno.EACCES, errno.EPERM, errno.EMFILE)
    return not (isinstance(error, OSError) and error.errno in refused)


def encode(tokenizer, text: str, limit: int, is_chat: bool = False) -> list[int]:
    """Token ids of a prompt with the tokenizer's BOS, once; beyond ``limit`` it loses its head,
    never BOS or its tail with the cue. ``is_chat``: with BOS only where the text has it, as
    transformers' ``apply_chat_template`` gives them."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], opening(tokenizer)
    if is_chat:
        bos = [tokenizer.bos_token_id] if ids[:1] == [tokenizer.bos_token_id] else []
    ids = ids[len(bos) :] if ids[: len(bos)] == bos else ids
    return bos + ids[-(limit - len(bos)) :] if limit > len(bos) else ids[-limit:]


def opening(tokenizer) -> list[int]:
    """Ids that the tokenizer's post-processor puts before a text: BOS, or none."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [number for number, _ in itertools.takewhile(lambda pair: pair[1], marked)]


def encode_reply(tokenizer, text: str) -> list[int]:
    """Token ids of a text that goes on from a prompt, as training has them
    (training/data/tokenizer.py): SentencePiece's normalizers would put a space of its own before a
    reply that is tokenised apart, so a line's end stands there and is cut off."""

    def apart(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    def inside(part: str) -> list[int]:
        before, joined = apart("\n"), apart("\n" + part)
        return joined[len(before) :] if joined[: len(before)] == before else apart(part)

    return apart(text) if all(apart(part) == inside(part) for part in (" a", "a")) else inside(text)


def uniforms(key: str, seed: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) that depend on ``key`` and ``seed`` alone."""
    name = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(name[:16], "big")).random(count)


class RowSampler(LogitsProcessor):
    """Draws each row's token and leaves it as the only finite score, so that greedy search takes
    it. temperature 0: untouched."""

    def __init__(self, temperatures: torch.Tensor, numbers: torch.Tensor):
        """temperatures (B,), numbers (B, steps) in [0, 1), both float64 on the model's device."""
        self.rows = temperatures.nonzero().squeeze(1)
        self.temperatures = temperatures[self.rows, None]
        self.numbers = numbers[self.rows]
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.rows):
            # (rows, vocab)
            cumulative = (scores[self.rows].double() / self.temperatures).softmax(-1).cumsum(-1)
            points = self.numbers[:, self.step, None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, points, right=True).squeeze(1).clamp(max=scores.shape[1] - 1)
            scores = scores.clone()
            scores[self.rows] = -math.inf
            scores[self.rows, tokens] = 0
        self.step += 1
        return scores


class StopStrings(StoppingCriteria):
    """Ends a row once its reply holds a stop string; ``ends`` keeps the length at which that
    happened, 0 = not yet."""

    def __init__(self, tokenizer, stop: Sequence[str], rows: int, width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.ends = [0] * rows
        # every token holds at least a byte, so a stop string that has just been completed lies in
        # this many tokens
        self.tail = max((len(text.encode()) for text in stop), default=0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :].tolist()
        for row, tail in enumerate(tails):
            if not self.ends[row] and any(text in _decode(self.tokenizer, tail, False) for text in self.stop):
                self.ends[row] = input_ids.shape[1] - self.width
        return torch.tensor([end > 0 for end in self.ends], device=input_ids.device)


def _decode(tokenizer, ids: list[int], skip_special_tokens: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _left_padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention_mask), both (B, longest)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.no_grad()
def generate(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    context_length: int,
    seed: int,
    stop: Sequence[str],
) -> list[Reply]:
    """One batch of replies, in the order of ``prompts``; a prompt keeps at most context_length -
    max_new_tokens tokens."""
    if context_length <= max_new_tokens:
        raise InvariantError(f"{max_new_tokens} new tokens in a context of {context_length}")
    eos, ends = tokenizer.eos_token_id, stops(model, tokenizer)
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    encoded = [encode(tokenizer, prompt.text, context_length - max_new_tokens, prompt.is_chat) for prompt in prompts]
    ids, mask = _left_padded(encoded, pad)
    numbers = np.stack([uniforms(prompt.key, seed, max_new_tokens) for prompt in prompts])
    sampler = RowSampler(
        torch.tensor([prompt.temperature for prompt in prompts], dtype=torch.float64, device=model.device),
        torch.from_numpy(numbers).to(model.device),
    )
    stopper = StopStrings(tokenizer, stop, len(prompts), ids.shape[1])
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=pad,
        logits_processor=[sampler],
        stopping_criteria=[stopper],
    )
    new = output[:, ids.shape[1] :].tolist()
    return [_reply(tokenizer, row, end, ends, stop) for row, end in zip(new, stopper.ends, strict=True)]


def _reply(tokenizer, ids: list[int], stop_end: int, ends: Sequence[int], stop: Sequence[str]) -> Reply:
    """Cut a generated row (padding behind its end) where it ended."""
    if stop_end:
        text = _decode(tokenizer, ids[:stop_end], True)
        return Reply(text[: min(text.find(s) for s in stop if s in text)], ids[:stop_end], "stop")
    end = next((at for at, number in enumerate(ids) if number in ends), None)
    if end is not None:
        return Reply(_decode(tokenizer, ids[:end], True), ids[: end + 1], "eos")
    return Reply(_decode(tokenizer, ids, True), ids, "length")
