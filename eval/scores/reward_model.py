"""A reward model as the measure of replies: its scores of them, and how often it prefers a model's
to the baseline's.

It is a sequence classifier with one label (an export's ``reward``). Of a reward model that the
policy was not trained on this says whether replies got better by the data's preferences; of the
policy's own, how far it was optimised. Both over a run's evaluations show over-optimisation:
``python -m eval.scores.reward_model RUN/rlhf --prompts RUN/data/heldout.jsonl own=FOLDER
other=FOLDER`` scores the replies that ``rlhf.keep_replies`` kept, and the report draws the means.

A reply is scored with its end, whether the model reached it or not: a PPO penalty for a missing end
is no part of the score.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from eval.answers import heldout
from eval.answers.generation import device, encode, encode_reply, load_tokenizer, readable
from eval.answers.heldout import HeldoutPrompt
from eval.errors import DataError
from eval.files.foreign import text, whole_number
from eval.files.jsonl import dump, last_by, read
from eval.files.rows import usable
from eval.scores import bootstrap, gold_score, win_rate

TOKENS = 1 << 15
"""Most tokens in one forward pass."""
REPLIES, RESCORED, PREFIX = "replies.jsonl", "rescored.jsonl", "score_"
"""What a trainer keeps, what is made of it, and how the numbers' names begin there."""
_REPLY = {"iteration": whole_number, "index": whole_number, "response": text}


@torch.no_grad()
def score(folder: str | Path, pairs: Sequence[tuple[HeldoutPrompt, str]], limit: int) -> list[float]:
    """The reward model's score of each (prompt, response), read at the token that ends the
    response. Messages are written by the reward model's own chat template. A prompt keeps its last
    ``limit`` tokens. Raises DataError for a folder that holds no classifier with one label, or no
    template for messages."""
    logging.disable_progress_bar()
    with readable(folder, " as a reward model"):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = load_tokenizer(folder)
    if model.config.num_labels != 1:
        raise DataError(
            f"{folder}: {model.config.num_labels} labels; expected a "
            "sequence classifier with one, as export makes of a reward model"
        )
    model, pad, vocabulary = (
        model.to(device()).eval(),
        model.config.pad_token_id,
        model.get_input_embeddings().num_embeddings,
    )
    if type(pad) is not int or not 0 <= pad < vocabulary:
        raise DataError(
            f"{folder}/config.json: pad_token_id = {pad}: expected the id of a token, from 0 to {vocabulary - 1}: the "
            "score is read at the last token that is no padding"
        )
    rows = [_ids(tokenizer, prompt, response, limit) for prompt, response in pairs]
    order, scores, start = sorted(range(len(rows)), key=lambda i: -len(rows[i])), [0.0] * len(rows), 0
    with _tensor_cores():
        while start < len(order):
            width = len(rows[order[start]])
            batch = order[start : start + max(1, TOKENS // width)]
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in batch])
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in batch])
            values = (
                model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
                .logits[:, 0]
                .double()
                .tolist()
            )
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
            start += len(batch)
    return scores


def _ids(tokenizer, prompt: HeldoutPrompt, response: str, limit: int) -> list[int]:
    """Prompt, response and its end, as the reward model was trained on them."""
    before = prompt.text(tokenizer)
    ids = encode(tokenizer, before, limit, prompt.is_chat)
    if not prompt.is_chat:
        return [*ids, *encode_reply(tokenizer, response), tokenizer.eos_token_id]
    reply = encode_reply(tokenizer, prompt.with_reply(tokenizer, response).removeprefix(before))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    end = next((at for at, number in enumerate(reply) if number in special), len(reply))
    return [*ids, *reply[:end], *(reply[end : end + 1] or [tokenizer.eos_token_id])]


@contextlib.contextmanager
def _tensor_cores():
    """fp32 products as TF32: 1e-3 of a score, far below what separates two replies."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def summary(scored: Mapping[str, Sequence[Mapping]], replies: Mapping[str, Sequence[Mapping]], seed: int) -> dict:
    """{"score", "win_rate", "length_controlled": {model: Interval}}: mean score, and the share of
    held-out prompts whose reply scores above the first model's reply to the same prompt (equal:
    half), all and at equal length (eval.scores.win_rate: a reward model may like short replies, or
    long ones). ``scored``: model -> rows {"index", "sample", "score"}; ``replies``: model -> rows
    {"index", "sample", "response"}; intervals are over prompts."""
    if not scored:
        return {"score": {}, "win_rate": {}, "length_controlled": {}}
    baseline, *others = scored
    base = {(row["index"], row["sample"]): row["score"] for row in scored[baseline]}
    wins = {
        name: [{**row, "won": _win(row["score"], base[row["index"], row["sample"]])} for row in scored[name]]
        for name in others
    }
    characters = {
        name: {(row["index"], row["sample"]): len(row["response"]) for row in replies[name]} for name in scored
    }
    return {
        "score": {
            name: bootstrap.mean(list(gold_score.by_prompt(rows, "score").values()), seed).as_dict()
            for name, rows in scored.items()
        },
        "win_rate": {
            name: bootstrap.mean(list(gold_score.by_prompt(rows, "won").values()), seed).as_dict()
            for name, rows in wins.items()
        },
        "length_controlled": {
            name: _at_equal_length(rows, characters[name], characters[baseline], seed) for name, rows in wins.items()
        },
    }


def _at_equal_length(wins: Sequence[Mapping], own: Mapping[tuple, int], others: Mapping[tuple, int], seed: int) -> dict:
    places = [(row["index"], row["sample"]) for row in wins]
    number = {index: place for place, index in enumerate(dict.fromkeys(index for index, _ in places))}
    longer = np.array([own[place] - others[place] for place in places], dtype=float)
    units = np.array([number[index] for index, _ in places])
    estimate = win_rate.length_controlled(np.array([row["won"] for row in wins]), longer, units, len(number), seed)
    return bootstrap.Interval(*estimate, len(number)).as_dict()


def _win(own: float, other: float) -> float:
    return 0.5 if own == other else float(own > other)


def rescore(
    stage: Path, prompts: Sequence[HeldoutPrompt], models: Mapping[str, str], limit: int, start: Sequence[Mapping] = ()
) -> list[dict]:
    """Write and return rows {"iteration", "score_NAME": mean of all kept replies, ...} of the
    stage's kept replies, by iteration; ``start``: rows {"index", "response"} of iteration 0."""
    if not (stage / REPLIES).exists():
        raise DataError(f"{stage / REPLIES}: no such file; only a run with {stage.name}.keep_replies = true writes it")
    replies = [{**row, "iteration": 0} for row in start] + read(stage / REPLIES)
    for place, row in enumerate(replies, 1):
        if not usable(row, _REPLY) or not 0 <= row["index"] < len(prompts):
            raise DataError(
                f"{stage / REPLIES}, or the replies of --start, row {place} of both: {str(row)[:200]}: expected "
                f'{{"iteration", "index", "response"}} with an index below the {len(prompts)} prompts'
            )
    rows = list(last_by(replies, lambda row: (row["iteration"], row["index"])).values())
    pairs = [(prompts[row["index"]], row["response"]) for row in rows]
    by_iteration: dict[int, dict] = defaultdict(dict)
    for name, folder in models.items():
        scores = defaultdict(list)
        for row, value in zip(rows, score(folder, pairs, limit), strict=True):
            scores[row["iteration"]].append(value)
        for iteration, values in scores.items():
            by_iteration[iteration][PREFIX + name] = sum(values) / len(values)
    table = [{"iteration": iteration, **values} for iteration, values in sorted(by_iteration.items())]
    dump(stage / RESCORED, table)
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.scores.reward_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", type=Path, help=f"folder of a trainer's stage, with {REPLIES}")
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER", help="reward models")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="the run's data/heldout.jsonl")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="the first model's replies, an evaluation's heldout/sft.jsonl: iteration 0",
    )
    parser.add_argument(
        "--prompt-length",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="a longer prompt loses its head (default: 1024)",
    )
    options = parser.parse_args(arguments)
    if options.prompt_length < 1:
        parser.error(f"--prompt-length {options.prompt_length}: expected at least 1")
    try:
        models = dict(each.split("=", 1) for each in options.models)
    except ValueError:
        parser.error("expected NAME=FOLDER")
    try:
        table = rescore(
            options.stage,
            heldout.load(str(options.prompts)),
            models,
            options.prompt_length,
            read(options.start) if options.start else (),
        )
    except DataError as error:
        print(error, file=sys.stderr)
        return 65
    for row in table:
        print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
