"""Held-out prompts: sampled replies of every model, their gold score, and the distance between the
models in nats.

The first model of the configuration is the baseline (SFT); each later one (RLHF) is compared with
it, prompt by prompt. KL(model || baseline) of a response is estimated on the model's own replies:
the sum over the response's tokens, the end-of-sequence token included, of log p_model - log
p_baseline, both at temperature 1 in float32. Its mean is unbiased; single values may be negative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from eval.answers import chat, dialogue, generation, rubric
from eval.answers.generation import Prompt
from eval.config import MTBenchConfig
from eval.errors import DataError
from eval.files.jsonl import append, last_by, read

_LOGITS = 2**28
"""Most logits in one forward pass of ``response_logprobs``: 1 GiB in float32."""


@dataclass(frozen=True)
class HeldoutPrompt:
    index: int
    """Row of the file, from 0."""
    prompt: str | list[dict]
    """HH's dialogue text, or messages for the tokenizer's chat template."""
    rubric: dict | None
    chat: dict = field(default_factory=dict)
    """"tools" and "arguments" of the template, where there are any."""

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def text(self, tokenizer) -> str:
        """The prompt as the model sees it. Raises TemplateError."""
        return chat.render_by(tokenizer, self.prompt, **self.chat) if self.is_chat else self.prompt

    def with_reply(self, tokenizer, reply: str) -> str:
        """The whole conversation, of messages."""
        messages = [*self.prompt, {"role": "assistant", "content": reply}]
        return chat.render_by(tokenizer, messages, **self.chat, cue=False)


def load(path: str) -> list[HeldoutPrompt]:
    """Rows {"prompt", "rubric"?}, none for the path ""; raises DataError naming file, line and
    field."""
    if not path:
        return []
    prompts = []
    for index, row in enumerate(read(path)):
        where = f"{path}, row {index + 1}"
        if not row.get("prompt") or not (isinstance(row["prompt"], str) or _are_messages(row["prompt"])):
            raise DataError(f"{where}: prompt = {row.get('prompt')!r}: expected a non-empty string, or messages")
        if row.get("rubric") is not None:
            rubric.validate(row["rubric"], where)
        options = {"tools": row.get("tools"), "arguments": row.get("chat_template_kwargs")}
        options = {name: value for name, value in options.items() if value}
        prompts.append(HeldoutPrompt(index, row["prompt"], row.get("rubric"), options))
    if not prompts:
        raise DataError(f"{path}: no rows; expected one or more held-out prompts")
    return prompts


def _are_messages(value) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and "role" in message for message in value)


def key(model: str, config: MTBenchConfig, prompt: HeldoutPrompt, sample: int) -> str:
    """Names everything that a reply depends on; ``model`` is the fingerprint."""
    parts = [
        model,
        prompt.prompt,
        prompt.chat,
        prompt.rubric,
        sample,
        config.stop,
        config.heldout_max_new_tokens,
        config.context_length,
        config.seed,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def stored(rows: Sequence[dict], keys: dict[tuple[int, int], str]) -> dict[tuple[int, int], dict]:
    """(index, sample) -> the row of the replies' file that stands there for it under its key."""
    last = last_by(rows, lambda row: (row["index"], row["sample"]))
    return {place: row for place, row in last.items() if keys.get(place) == row["key"]}


def reply(
    model,
    tokenizer,
    places: Sequence[tuple[HeldoutPrompt, int]],
    keys: dict[tuple[int, int], str],
    config: MTBenchConfig,
    path: Path,
    done: Callable[[int], None],
) -> None:
    """Sample a reply for each (prompt, sample) and append its row, gold score included, to
    ``path``."""
    for batch in dialogue.batches(places, config.batch_size):
        prompts = [
            Prompt(prompt.text(tokenizer), 1.0, f"heldout/{prompt.index}/{sample}", prompt.is_chat)
            for prompt, sample in batch
        ]
        replies = generation.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.heldout_max_new_tokens,
            context_length=config.context_length,
            seed=config.seed,
            stop=dialogue.stops(config),
        )
        append(
            path,
            [
                {
                    "index": prompt.index,
                    "sample": sample,
                    "prompt": written.text,
                    "is_chat": prompt.is_chat,
                    "response": answer.text,
                    "tokens": answer.tokens,
                    "finish": answer.finish,
                    "gold": None if prompt.rubric is None else rubric.gold(answer.text, prompt.rubric),
                    "key": keys[prompt.index, sample],
                }
                for (prompt, sample), written, answer in zip(batch, prompts, replies, strict=True)
            ],
        )
        done(len(batch))


@torch.no_grad()
def response_logprobs(model, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> list[float]:
    """Log-probability of each response after its prompt in nats, summed over its tokens in float64.

    Longest rows first and as many together as ``_LOGITS`` allows; right-padded, which a causal
    model doesn't see.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(responses[i]))
    sums = [0.0] * len(prompts)
    start = 0
    while start < len(order):
        width = len(prompts[order[start]]) + len(responses[order[start]])
        rows = order[start : start + max(1, _LOGITS // (width * model.config.vocab_size))]
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            joined = prompts[row] + responses[row]
            ids[place, : len(joined)] = torch.tensor(joined)
            mask[place, : len(joined)] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        for place, row in enumerate(rows):
            first, end = len(prompts[row]), len(prompts[row]) + len(responses[row])
            logprobs = logits[place, first - 1 : end - 1].float().log_softmax(-1)
            tokens = torch.tensor(responses[row], device=logprobs.device)
            sums[row] = logprobs.gather(1, tokens[:, None]).double().sum().item()
        start += len(rows)
    return sums


def kl_rows(folder: str, base_folder: str, rows: Sequence[dict], base: str, config: MTBenchConfig) -> list[dict]:
    """One row a reply: {"index", "sample", "key", "kl", "tokens"}. ``rows`` are the model's
    replies, ``base`` the baseline's fingerprint. One model is in memory at a time."""
    limit = config.context_length - config.heldout_max_new_tokens
    responses = [row["tokens"] for row in rows]
    sums = []
    for place in (folder, base_folder):
        model, tokenizer = generation.load(place, fp32=True)
        prompts = [generation.encode(tokenizer, row["prompt"], limit, row.get("is_chat", False)) for row in rows]
        sums.append(response_logprobs(model, prompts, responses))
        del model
    return [
        {
            "index": row["index"],
            "sample": row["sample"],
            "key": kl_key(row, base),
            "kl": own - other,
            "tokens": len(row["tokens"]),
        }
        for row, own, other in zip(rows, *sums, strict=True)
    ]


def kl_key(row: dict, base: str) -> str:
    """Names the reply, word for word, and the baseline that a KL belongs to."""
    return f"{row['key']}-{content_hash(row['tokens'])}-{base}"


def content_hash(reply: list[int] | str) -> str:
    """Of a reply's tokens or text: another device may sample others under the same key."""
    return hashlib.sha256(json.dumps(reply).encode()).hexdigest()[:16]
