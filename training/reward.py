"""Reward model: ``python -m training.reward config.json``.

The SFT model with a new scalar head, read at the last real token (the EOS), learns -log sigmoid(r_i
- r_j) over each query's pairs, averaged over the query and then over queries (Ouyang et al. 2022).
All replies of a query are in one forward pass. Every checkpoint holds the bias with which the SFT
policy's own responses score 0 on average (training/rl/reward_bias.py).
"""

from __future__ import annotations

import math
import sys
from functools import partial

import torch

from training.config.shape import Shape
from training.config.trainers import RewardConfig
from training.data.batches import Example, collate, comparison_example, padded_length, shard
from training.data.packing import collate_packed, lay_out
from training.distributed import groups
from training.losses import pairwise_loss
from training.main import run_stage
from training.models.heads import read_last
from training.rl import reward_bias
from training.trainer.loop import SupervisedTask
from training.trainer.reward_metrics import judged
from training.trainer.setup import Inputs, learn, length_multiple, limits
from training.trainer.step import Batch, Learner, Objective, split

HEADLINE = (
    "loss",
    "accuracy",
    "margin",
    "heldout_accuracy",
    "shorter_wins",
    "reward_bias",
    "packing_efficiency",
    "grad_norm",
)
Comparison = list[tuple[Example, float]]
"""The replies to one query with their scores."""


def compute(replies: int, values: torch.Tensor, batch: Batch):
    """Sum of the queries' losses, number of queries with a pair, and sums of (loss, accuracy,
    margin)."""
    rewards = values.gather(1, batch["ends"]) if "ends" in batch else read_last(values, batch)
    rewards, scores = rewards.view(-1, replies), batch["scores"].view(-1, replies)
    loss, accuracy, margin, valid = pairwise_loss(rewards, scores)
    return loss.sum(), valid.sum(), torch.stack((loss.sum(), accuracy.sum(), margin.sum()))


def collate_comparisons(comparisons: list[Comparison], replies: int, pad_id: int, length: int) -> Batch:
    """``replies`` rows a query; where it has fewer, its last reply is repeated with score NaN,
    which forms no pair."""
    filled = [group + [(group[-1][0], math.nan)] * (replies - len(group)) for group in comparisons]
    batch = collate([example for group in filled for example, _ in group], pad_id, length)
    return {**batch, "scores": torch.tensor([score for group in filled for _, score in group], dtype=torch.double)}


def collate_packed_comparisons(rows: list[list[Comparison]], replies: int, pad_id: int, length: int) -> Batch:
    """Rows (B, length) of several queries, each reply with its query a document: "tokens",
    "documents", and for each query of a row and each of its replies "ends" (B, queries x replies),
    the place of its last token, and "scores", NaN where there is none."""
    batch = collate_packed([[example for group in row for example, _ in group] for row in rows], pad_id, length)
    ends = torch.zeros(len(rows), max(map(len, rows)), replies, dtype=torch.long)
    # in fp32 large scores that differ would be ties
    scores = torch.full(ends.shape, math.nan, dtype=torch.double)
    for number, row in enumerate(rows):
        end = -1
        for query, group in enumerate(row):
            for reply, (example, score) in enumerate(group):
                end += len(example.tokens)
                ends[number, query, reply], scores[number, query, reply] = end, score
    return {
        "tokens": batch["tokens"],
        "documents": batch["documents"],
        "ends": ends.flatten(1),
        "scores": scores.flatten(1),
    }


def global_batch(
    config: RewardConfig, shape: Shape, comparisons: list[Comparison], replies: int, pad_id: int
) -> tuple[list[Batch], dict[str, float]]:
    """A global batch -> this data-parallel rank's micro-batches, and what the log says of it.
    Packed, a row holds whole queries: those of one with long replies may be longer than seq_length.
    No micro-batch has more tokens than unpacked rows of full length."""
    ranks, rank = groups.data_ranks(), groups.data_rank()
    lengths = [sum(len(example.tokens) for example, _ in group) for group in comparisons]
    if config.packing:
        capacity = max(config.seq_length, *lengths)
        rows = config.micro_batch_size * replies * config.seq_length // capacity
        layout = lay_out(lengths, limits(config, shape)._replace(capacity=capacity, micro_batch_size=rows))
        local = [[comparisons[index] for index in row] for row in shard(layout.rows, rank, ranks)]
        batch, size = collate_packed_comparisons(local, replies, pad_id, layout.length), layout.micro_batch_size
        computed = len(layout.rows) * layout.length
    else:
        length = padded_length(
            [len(example.tokens) for group in comparisons for example, _ in group], length_multiple(config)
        )
        batch, size = (
            collate_comparisons(shard(comparisons, rank, ranks), replies, pad_id, length),
            config.micro_batch_size * replies,
        )
        computed = len(comparisons) * replies * length
    return split(batch, size), {"tokens": sum(lengths), "packing_efficiency": sum(lengths) / computed}


def heldout(
    config: RewardConfig, learner: Learner, comparisons: list[Comparison], replies: int, pad_id: int
) -> dict[str, float]:
    """``judged`` on all held-out pairs. A collective."""
    local = comparisons[groups.data_rank() :: groups.data_ranks()]
    if not local:
        return judged(*torch.zeros(3, 0, replies))
    real = torch.tensor([[reply < len(group) for reply in range(replies)] for group in local])
    examples = [(example, score) for group in local for example, score in group]
    rewards, scores, lengths = (
        torch.zeros(real.shape),
        torch.full(real.shape, math.nan, dtype=torch.double),
        torch.zeros(real.shape),
    )
    rewards[real] = reward_bias.rewards(config, learner, [example for example, _ in examples], pad_id)
    scores[real] = torch.tensor([score for _, score in examples], dtype=torch.double)
    lengths[real] = torch.tensor([float(len(example.tokens) - example.response_start) for example, _ in examples])
    return judged(rewards, scores, lengths)


def task(config: RewardConfig, inputs: Inputs, learner: Learner) -> SupervisedTask:
    rows, tokenizer, responses = inputs.rows, inputs.tokenizer, reward_bias.read(config)
    unseen = [comparison_example(row, config.seq_length) for row in inputs.unseen]
    replies = max(rows.most_replies, inputs.unseen.most_replies)

    def micro_batches(indices: list[int]) -> tuple[list[Batch], dict[str, float]]:
        comparisons = [comparison_example(rows[index], config.seq_length) for index in indices]
        return global_batch(config, inputs.shape, comparisons, replies, tokenizer.pad_id)

    def bias() -> dict[str, float]:
        return {"reward_bias": reward_bias.bias(config, learner, responses, rows.stop_ids, tokenizer.pad_id)}

    objective = Objective(("loss", "accuracy", "margin"), partial(compute, replies))
    return SupervisedTask(
        objective,
        micro_batches,
        lambda: heldout(config, learner, unseen, replies, tokenizer.pad_id) | bias(),
        headline=HEADLINE,
        state=bias,
    )


def run(config: RewardConfig) -> None:
    """The stage, inside ``ranks``."""
    learn(config, "reward", "scalar", task, reward_bias.answer)


if __name__ == "__main__":
    sys.exit(run_stage(RewardConfig, run))
