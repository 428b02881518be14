"""Direct preference optimisation (Rafailov et al. 2023): ``python -m training.dpo config.json``.

The reward model's loss over each query's pairs, with the implicit reward beta (log p(reply) - log
p_ref(reply)) in place of the head's: the policy is its own reward model. The reference is the SFT
model with which training begins. Its log-probabilities, one number a reply, are computed once,
before the first step and with the very model that then learns, and kept in ``reference.pt``: no
second model in memory, no second forward pass in a step, and a resumed run has the same bits.
"""

from __future__ import annotations

import hashlib
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from training import losses
from training.checkpoint import checksums
from training.checkpoint.stage_folder import StageFolder
from training.config.trainers import DPOConfig
from training.data.batches import Sampler, comparison_example, padded_length, shard
from training.data.cache import Tokenised
from training.distributed import groups
from training.files import atomic
from training.main import run_stage
from training.models.heads import Output, next_token_logprobs
from training.reward import Comparison, collate_comparisons
from training.trainer.loop import SupervisedTask
from training.trainer.reward_metrics import judged
from training.trainer.setup import Inputs, learn, length_multiple
from training.trainer.step import Batch, Learner, Objective, evaluate, split

HEADLINE = (
    "loss",
    "accuracy",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "heldout_accuracy",
    "heldout_margin",
    "grad_norm",
)


class Comparisons:
    """All queries that the stage sees: the training rows, then the held-out ones. ``reference``
    (queries, K) fp32 holds log p_ref of each reply, NaN where it is not known."""

    def __init__(self, config: DPOConfig, inputs: Inputs):
        self.config, self.inputs, self.trained = config, inputs, len(inputs.rows)
        self.replies = max(inputs.rows.most_replies, inputs.unseen.most_replies)
        self.reference = torch.full((self.trained + len(inputs.unseen), self.replies), torch.nan)

    def __getitem__(self, index: int) -> Comparison:
        return comparison_example(self.row(index), self.config.seq_length)

    def row(self, index: int) -> Tokenised:
        return self.inputs.rows[index] if index < self.trained else self.inputs.unseen[index - self.trained]

    def batch(self, indices: list[int], local: list[int]) -> tuple[Batch, int]:
        """The rows of the queries ``local``, with "reference", padded as all of ``indices`` need
        it; and the tokens of all of them."""
        comparisons = {index: self[index] for index in indices}
        lengths = [len(example.tokens) for comparison in comparisons.values() for example, _ in comparison]
        padded = padded_length(lengths, length_multiple(self.config))
        batch = collate_comparisons(
            [comparisons[index] for index in local], self.replies, self.inputs.tokenizer.pad_id, padded
        )
        return {**batch, "reference": self.reference[local].flatten()}, sum(lengths)


def reply_logprobs(output: Output, batch: Batch) -> torch.Tensor:
    """log p(reply | prompt), its EOS included, of each row (B,)."""
    return next_token_logprobs(output, batch["tokens"], mask=batch["response_mask"]).sum(1)


def objective(config: DPOConfig, replies: int) -> Objective:
    pair_loss = (
        partial(losses.ipo_loss, beta=config.beta)
        if config.loss == "ipo"
        else partial(losses.logistic_loss, label_smoothing=config.label_smoothing)
    )

    def compute(output: Output, batch: Batch):
        """Sum of the queries' losses and number of queries with a pair, as in the reward model."""
        rewards = config.beta * (reply_logprobs(output, batch) - batch["reference"]).view(-1, replies)
        scores = batch["scores"].view(-1, replies)
        loss, accuracy, margin, valid = losses.pairwise_loss(rewards, scores, pair_loss)
        pair = (scores[:, :, None] > scores[:, None, :]).float()
        pairs = pair.sum((1, 2)).clamp(min=1)
        chosen, rejected = (pair.sum(2) * rewards).sum(1) / pairs, (pair.sum(1) * rewards).sum(1) / pairs
        return (
            loss.sum(),
            valid.sum(),
            torch.stack([values.sum() for values in (loss, accuracy, margin, chosen, rejected)]),
        )

    return Objective(("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"), compute)


def evaluated(learner: Learner, data: Comparisons, indices: list[int]) -> tuple[Batch, torch.Tensor]:
    """This data-parallel rank's rows of the queries ``indices``, and log p of their replies
    (rows,), on every pipeline stage."""
    batch, _ = data.batch(indices, indices[groups.data_rank() :: groups.data_ranks()] or indices[:1])
    logprobs = evaluate(
        learner.wrapped,
        batch,
        data.config.micro_batch_size * data.replies,
        lambda output, micro: next_token_logprobs(output, micro["tokens"], mask=micro["response_mask"]),
    )
    return batch, logprobs.cpu().sum(1)


def ask_reference(learner: Learner, data: Comparisons) -> None:
    """Fill ``data.reference`` in for every query that training or evaluation will see, while the
    learner still is the SFT model.

    What an earlier attempt has computed is read from ``reference.pt``. A collective.
    """
    config = data.config
    sampler = Sampler(data.trained, config.global_batch_size, config.seed)
    # one epoch has all rows
    steps = min(config.iterations, -(-data.trained // config.global_batch_size))
    seen = {index for _ in range(steps) for index in sampler.next_batch()} | set(
        range(data.trained, len(data.reference))
    )
    path, made_from = Path(config.paths.output) / "reference.pt", identity(data)
    data.reference = read_reference(path, made_from, data.reference)

    def length(index: int) -> int:
        row = data.row(index)
        return len(row.prompt) + max(map(len, row.replies))

    # Rows of about equal length together: little padding.
    missing = sorted(
        (index for index in seen if data.reference[index].isnan().any()), key=lambda index: (length(index), index)
    )
    if not missing:
        return
    references, ranks = torch.zeros_like(data.reference[missing]), groups.data_ranks()
    for first in range(0, len(missing), config.global_batch_size):
        indices = missing[first : first + config.global_batch_size]
        places = range(first + groups.data_rank(), first + len(indices), ranks)
        _, logprobs = evaluated(learner, data, indices)
        references[list(places)] = logprobs.view(-1, data.replies)[: len(places)]
    data.reference[missing] = groups.sum_over_data(references.to(groups.device())).cpu()
    if groups.is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as temporary:
            torch.save({"made_from": made_from, "logprobs": data.reference}, temporary)
        print(f"reference: log-probabilities of {len(missing)} queries' replies are in {path}", flush=True)


def identity(data: Comparisons) -> str:
    """What ``reference.pt`` depends on: the SFT checkpoint's bytes, the rows (their caches' names
    are hashes) and how they are cut."""
    listed = checksums.read(StageFolder(data.config.paths.init).resolve())
    caches = [rows.folder.name for rows in (data.inputs.rows, data.inputs.unseen)]
    config = data.config
    described = repr((sorted(listed.items()), caches, config.seq_length, config.precision, config.attention))
    return hashlib.sha256(described.encode()).hexdigest()


def read_reference(path: Path, made_from: str, unknown: torch.Tensor) -> torch.Tensor:
    """What the file holds, on every rank, if it was made from the same; else ``unknown``. Rank 0
    reads: all must decide alike."""
    if groups.is_main() and path.exists():
        stored = torch.load(path, weights_only=True)
        unknown = stored["logprobs"] if stored["made_from"] == made_from else unknown
    dist.broadcast(unknown, 0)
    return unknown


def heldout(learner: Learner, data: Comparisons) -> dict[str, float]:
    """The reward model's numbers, of implicit rewards; and KL(reference || policy) in nats a reply,
    by k1: in the mean exact where the replies are the reference's own. (mtbench measures KL(policy
    || reference), on replies that it samples.) A collective."""
    indices = list(range(data.trained, len(data.reference)))
    batch, logprobs = evaluated(learner, data, indices)
    # none where there are more ranks than queries
    shown = slice(len(indices[groups.data_rank() :: groups.data_ranks()]))
    ratio, scores, lengths = (
        values.view(-1, data.replies)[shown]
        for values in (logprobs - batch["reference"], batch["scores"], batch["response_mask"].sum(1))
    )
    real = ~scores.isnan()
    drift, count = groups.sum_over_data(
        torch.stack((-ratio[real].double().sum(), real.double().sum())).to(groups.device())
    ).tolist()
    return {**judged(data.config.beta * ratio, scores, lengths), "heldout_kl_from_reference": drift / count}


def task(config: DPOConfig, inputs: Inputs, learner: Learner) -> SupervisedTask:
    data = Comparisons(config, inputs)
    ask_reference(learner, data)

    def micro_batches(indices: list[int]) -> tuple[list[Batch], dict[str, float]]:
        batch, tokens = data.batch(indices, shard(indices, groups.data_rank(), groups.data_ranks()))
        return split(batch, config.micro_batch_size * data.replies), {"tokens": tokens}

    return SupervisedTask(objective(config, data.replies), micro_batches, lambda: heldout(learner, data), HEADLINE)


def run(config: DPOConfig) -> None:
    """The stage, inside ``ranks``."""
    learn(config, "reward", "lm", task)


if __name__ == "__main__":
    sys.exit(run_stage(DPOConfig, run))
