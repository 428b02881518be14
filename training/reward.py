"""Reward model: ``python -m training.reward config.json``.

The SFT model with a new scalar head, read at the last real token (the EOS), learns -log sigmoid(r_i - r_j) over each query's
pairs, averaged over the query and then over queries (Ouyang et al. 2022). All replies of a query are in one forward pass.
"""

from __future__ import annotations

import math
import sys
from functools import partial

import torch

from training import parallel
from training.config import RewardConfig
from training.data.batches import Example, collate, comparison_example, padded_length, shard
from training.loop import Task
from training.losses import pairwise_loss
from training.main import run_stage
from training.start import Inputs, learn, length_multiple
from training.step import Batch, Learner, Objective, evaluate, split

Comparison = list[tuple[Example, float]]
"""The replies to one query with their scores."""


def read_last(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The head's values (B, T) at each row's last real token (B,)."""
    return values.gather(1, batch["lengths"][:, None] - 1).squeeze(1)


def compute(replies: int, values: torch.Tensor, batch: Batch):
    """Sum of the queries' losses, number of queries with a pair, and sums of (loss, accuracy, margin)."""
    rewards, scores = read_last(values, batch).view(-1, replies), batch["scores"].view(-1, replies)
    loss, accuracy, margin, valid = pairwise_loss(rewards, scores)
    return loss.sum(), valid.sum(), torch.stack((loss.sum(), accuracy.sum(), margin.sum()))


def collate_comparisons(comparisons: list[Comparison], replies: int, pad_id: int, length: int) -> Batch:
    """``replies`` rows a query; where it has fewer, its last reply is repeated with score NaN, which forms no pair."""
    filled = [group + [(group[-1][0], math.nan)] * (replies - len(group)) for group in comparisons]
    batch = collate([example for group in filled for example, _ in group], pad_id, length)
    return {**batch, "scores": torch.tensor([score for group in filled for _, score in group], dtype=torch.float)}


def wilson(correct: float, total: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    z = 1.959964
    centre = (correct + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return centre - half, centre + half


CONFIDENCE = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Lower edges of the bins in which calibration is measured: the model's probability that the reply it prefers is the better one."""


def calibration_sums(margin: torch.Tensor) -> torch.Tensor:
    """``margin`` (pairs,): reward of the better reply less that of the other -> (3, bins): pairs, those that the model orders rightly, and
    their summed confidence sigmoid(abs(margin)), by confidence. Sums, so that data-parallel ranks can add them up."""
    confidence, right = margin.abs().sigmoid(), (margin > 0).double()
    place = torch.bucketize(confidence, torch.tensor(CONFIDENCE[1:], dtype=confidence.dtype), right=True)
    bins = torch.nn.functional.one_hot(place, len(CONFIDENCE)).double()
    return torch.stack((bins.sum(0), right @ bins, confidence.double() @ bins))


def calibration(sums: torch.Tensor) -> dict[str, float]:
    """Accuracy at each confidence (bins without a pair are left out), and the expected calibration error (Guo et al. 2017, eq. 3): how far
    accuracy is from confidence, 0 at best.

    >>> calibration(calibration_sums(torch.tensor([2.2, 2.2, 2.2, -2.2])))  # 90% sure, 75% right
    {'heldout_calibration_error': 0.1502, 'heldout_accuracy_at_0.9': 0.75}
    """
    pairs, right, confidence = sums
    error = ((right - confidence).abs().sum() / pairs.sum()).item()
    found = {f"heldout_accuracy_at_{edge}": hit / count
             for edge, count, hit in zip(CONFIDENCE, pairs.tolist(), right.tolist(), strict=True) if count}
    return {"heldout_calibration_error": round(error, 4), **found}


def heldout(config: RewardConfig, learner: Learner, comparisons: list[Comparison], replies: int, pad_id: int) -> dict[str, float]:
    """``judged`` on all held-out pairs. A collective."""

    def rewards(batch: Batch) -> torch.Tensor:
        values = evaluate(learner.wrapped, batch, config.micro_batch_size * replies, lambda values, micro: values).cpu()
        return read_last(values, batch)

    mine = comparisons[parallel.data_rank() :: parallel.data_ranks()]
    if not mine:
        return judged(*torch.zeros(3, 0, replies))
    length = padded_length([len(example.tokens) for group in mine for example, _ in group], length_multiple(config))
    batch = collate_comparisons(mine, replies, pad_id, length)
    return judged(*(values.view(-1, replies) for values in (rewards(batch), batch["scores"], batch["lengths"])))


def judged(rewards: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """This data-parallel rank's rewards, scores and rows' lengths, each (Q, K) -> over all ranks' pairs: accuracy with its 95% interval,
    mean margin, calibration, and the accuracy of "the shorter reply wins". A collective."""
    pair = scores[:, :, None] > scores[:, None, :]
    margin = (rewards[:, :, None] - rewards[:, None, :])[pair].double()
    shorter = (lengths[:, :, None] < lengths[:, None, :])[pair]
    sums = torch.stack((pair.sum().double(), (margin > 0).sum().double(), margin.sum(), shorter.sum().double()))
    total, correct, margins, shorter = parallel.sum_over_data(sums.to(parallel.device())).tolist()
    bins = parallel.sum_over_data(calibration_sums(margin).to(parallel.device())).cpu()
    low, high = wilson(correct, total)
    return {"heldout_accuracy": correct / total, "heldout_accuracy_low": low, "heldout_accuracy_high": high,
            "heldout_margin": margins / total, "shorter_wins": shorter / total, **calibration(bins)}


def task(config: RewardConfig, inputs: Inputs, learner: Learner) -> Task:
    rows, tokenizer = inputs.rows, inputs.tokenizer
    unseen = [comparison_example(row, tokenizer, config.seq_length) for row in inputs.unseen]
    replies = max(rows.most_replies, inputs.unseen.most_replies)

    def micro_batches(indices: list[int]) -> tuple[list[Batch], dict[str, float]]:
        comparisons = [comparison_example(rows[index], tokenizer, config.seq_length) for index in indices]
        lengths = [len(example.tokens) for group in comparisons for example, _ in group]
        mine = shard(comparisons, parallel.data_rank(), parallel.data_ranks())
        batch = collate_comparisons(mine, replies, tokenizer.pad_id, padded_length(lengths, length_multiple(config)))
        return split(batch, config.micro_batch_size * replies), {"tokens": sum(lengths)}

    objective = Objective(("loss", "accuracy", "margin"), partial(compute, replies))
    return Task(objective, micro_batches, lambda: heldout(config, learner, unseen, replies, tokenizer.pad_id),
                headline=("loss", "accuracy", "margin", "heldout_accuracy", "shorter_wins", "grad_norm"))


def run(config: RewardConfig) -> None:
    """The stage, inside ``ranks``."""
    learn(config, "reward", "scalar", task)


if __name__ == "__main__":
    sys.exit(run_stage(RewardConfig, run))
