"""Supervised fine-tuning: ``python -m training.sft config.json``.

Next-token cross entropy on response tokens only, with one denominator for the whole global batch: a
mean of micro-batch means would weigh tokens by their batch. With packing a row holds several
examples, each a document that sees only itself; without, rows are padded on the right, where causal
attention needs no mask.
"""

from __future__ import annotations

import math
import sys

import torch

from training.config.shape import Shape
from training.config.trainers import SFTConfig
from training.data.batches import Example, collate, padded_length, prompt_tokens, sft_example, shard
from training.data.packing import collate_packed, lay_out
from training.distributed import groups
from training.errors import NoRoom
from training.generation.rollout_workers import Replicas
from training.main import run_stage
from training.models.heads import Output, next_token_logprobs, next_token_nll
from training.trainer import sample_text
from training.trainer.early_stopping import EarlyStop
from training.trainer.loop import SupervisedTask
from training.trainer.setup import Inputs, learn, length_multiple, limits, packed
from training.trainer.step import Batch, Learner, Objective, evaluate, split


def compute(output: Output, batch: Batch):
    """Sum of -log p over the batch's response tokens, their number, and the sum again for the
    log."""
    loss = next_token_nll(output, batch["tokens"], batch["response_mask"])
    return loss, batch["response_mask"].sum(), loss[None]


def global_batch(
    config: SFTConfig, shape: Shape, examples: list[Example], pad_id: int
) -> tuple[list[Batch], dict[str, float]]:
    """A global batch -> this data-parallel rank's micro-batches, and what the log says of it:
    "tokens", examples' without padding, and "packing_efficiency", their part of all that is
    computed."""
    ranks, lengths = groups.data_ranks(), [len(example.tokens) for example in examples]
    layout = lay_out(lengths, limits(config, shape)) if config.packing else None
    if layout and len(layout.rows) < len(examples):
        rows, length, size = layout
        batch = collate_packed(
            [[examples[index] for index in row] for row in shard(rows, groups.data_rank(), ranks)], pad_id, length
        )
    else:
        rows, length, size = examples, padded_length(lengths, length_multiple(config)), config.micro_batch_size
        batch = collate(shard(examples, groups.data_rank(), ranks), pad_id, length)
    counts = {"tokens": sum(lengths), "packing_efficiency": sum(lengths) / (len(rows) * length)}
    return split(batch, size), counts


def heldout(config: SFTConfig, learner: Learner, examples: list[Example], pad_id: int) -> dict[str, float]:
    """Loss per response token (nats), perplexity and, as the floor to beat, the tokens' unigram
    entropy (nats)."""
    local = examples[groups.data_rank() :: groups.data_ranks()]
    sums = torch.zeros(2, dtype=torch.double)
    if local:
        batch = (
            packed(config, local, pad_id)[0]
            if config.packing
            else collate(
                local, pad_id, padded_length([len(example.tokens) for example in local], length_multiple(config))
            )
        )
        logprobs = evaluate(
            learner.wrapped,
            batch,
            config.micro_batch_size,
            lambda output, micro: next_token_logprobs(output, micro["tokens"], mask=micro["response_mask"]),
        )
        sums = torch.stack((-(logprobs.cpu() * batch["response_mask"]).sum(), batch["response_mask"].sum())).double()
    loss, count = groups.sum_over_data(sums.to(groups.device())).tolist()
    tokens = torch.cat([torch.tensor(example.tokens[example.response_start :]) for example in examples])
    frequency = tokens.bincount().double() / len(tokens)
    entropy = -(frequency[frequency > 0] * frequency[frequency > 0].log()).sum().item()
    return {
        "heldout_loss": loss / count,
        "heldout_perplexity": math.exp(min(loss / count, 700.0)),
        "unigram_entropy": entropy,
    }


def task(config: SFTConfig, inputs: Inputs, learner: Learner) -> SupervisedTask:
    tokenizer = inputs.tokenizer
    unseen = [sft_example(row, config.seq_length) for row in inputs.unseen]

    def micro_batches(indices: list[int]) -> tuple[list[Batch], dict[str, float]]:
        examples = [sft_example(inputs.rows[index], config.seq_length) for index in indices]
        return global_batch(config, inputs.shape, examples, tokenizer.pad_id)

    return SupervisedTask(
        Objective(("loss",), compute),
        micro_batches,
        lambda: heldout(config, learner, unseen, tokenizer.pad_id),
        headline=("loss", "heldout_loss", "unigram_entropy", "packing_efficiency", "grad_norm", "lr"),
        early_stop=EarlyStop(config.patience, config.min_delta, "heldout_loss") if config.patience else None,
        samples=samples(config, inputs, learner) if config.sample_every else None,
    )


def samples(config: SFTConfig, inputs: Inputs, learner: Learner) -> sample_text.Samples:
    """Greedy replies to the first held-out prompts. A collective."""
    steps, tokenizer = min(config.sample_length, config.seq_length // 2), inputs.tokenizer
    count = min(config.sample_prompts, len(inputs.unseen))
    prompts = [prompt_tokens(inputs.unseen[index], config.seq_length - steps) for index in range(count)]
    replicas = Replicas(
        learner.model,
        inputs.shape.with_tokens(tokenizer.ids),
        sample_text.limits(config.seq_length),
        inputs.rows.stop_ids,
    )

    def say() -> list[tuple[str, str]]:
        try:
            answers = sample_text.replies(replicas, prompts, steps)
        except NoRoom as error:  # on all ranks; the sample is for people to read, the stage goes on without
            if groups.is_main():
                print(f"warning: no sample replies: {error}", flush=True)
            return []
        ended = [answer[-1] in inputs.rows.stop_ids for answer in answers]
        texts = [tokenizer.decode(answer) + "..." * (not end) for answer, end in zip(answers, ended, strict=True)]
        return list(zip(map(tokenizer.decode, prompts), texts, strict=True))

    return sample_text.Samples(config.sample_every, say)


def run(config: SFTConfig) -> None:
    """The stage, inside ``ranks``."""
    learn(config, "sft", "lm", task)


if __name__ == "__main__":
    sys.exit(run_stage(SFTConfig, run))
