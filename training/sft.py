"""Supervised fine-tuning: ``python -m training.sft config.json``.

Next-token cross entropy on response tokens only, with one denominator for the whole global batch: a mean of micro-batch
means would weigh tokens by their batch. With packing a row holds several examples, each a document that sees only itself; without,
rows are padded on the right, where causal attention needs no mask.
"""

from __future__ import annotations

import math
import sys

import torch

from training import checkpoint, parallel
from training.config import SFTConfig, TrainerConfig
from training.data.batches import Example, Sampler, collate, padded_length, sft_example, shard
from training.data.formats import load_rows
from training.data.packing import collate_packed, pack
from training.data.tokenizer import Tokenizer
from training.loop import Task, train
from training.main import run_stage
from training.model.backends import FLEX_BLOCK
from training.model.heads import next_token_logprobs
from training.shape import BloomShape
from training.step import Batch, Learner, Objective, build_model, evaluate, split


def length_multiple(config: TrainerConfig) -> int:
    """Padded lengths are multiples of this: sequence parallelism divides them, and on a GPU attention's kernels are compiled for each."""
    if parallel.device().type == "cuda":
        return math.lcm(FLEX_BLOCK, config.tensor_parallel)
    return 8 * config.tensor_parallel


def compute(logits: torch.Tensor, batch: Batch):
    """Sum of -log p over the batch's response tokens, their number, and the sum again for the log."""
    logprobs = next_token_logprobs(logits, batch["tokens"])
    loss = -(logprobs * batch["response_mask"]).sum()
    return loss, batch["response_mask"].sum(), loss[None]


def global_batch(config: SFTConfig, examples: list[Example], pad_id: int) -> tuple[list[Batch], dict[str, float]]:
    """A global batch -> this data-parallel rank's micro-batches, and what the log says of it: "tokens", examples' without padding, and
    "packing_efficiency", their part of all that is computed."""
    ranks, lengths = parallel.data_ranks(), [len(example.tokens) for example in examples]
    # The interleaved schedule takes micro-batches in groups of the pipeline's size.
    unit = ranks * config.micro_batch_size * (config.pipeline_parallel if config.virtual_pipeline > 1 else 1)
    packed = pack(lengths, config.seq_length, unit) if config.packing else []
    if 0 < len(packed) < len(examples):
        rows = [[examples[index] for index in row] for row in packed]
        length = padded_length([sum(lengths[index] for index in row) for row in packed], length_multiple(config))
        batch = collate_packed(shard(rows, parallel.data_rank(), ranks), pad_id, length)
    else:
        rows, length = examples, padded_length(lengths, length_multiple(config))
        batch = collate(shard(examples, parallel.data_rank(), ranks), pad_id, length)
    said = {"tokens": sum(lengths), "packing_efficiency": sum(lengths) / (len(rows) * length)}
    return split(batch, config.micro_batch_size), said


def heldout(config: SFTConfig, learner: Learner, examples: list[Example], pad_id: int) -> dict[str, float]:
    """Loss per response token (nats), perplexity and, as the floor to beat, the tokens' unigram entropy (nats)."""
    mine = examples[parallel.data_rank() :: parallel.data_ranks()]
    sums = torch.zeros(2, dtype=torch.double)
    if mine:
        length = padded_length([len(example.tokens) for example in mine], length_multiple(config))
        batch = collate(mine, pad_id, length)
        logprobs = evaluate(learner.wrapped, batch, config.micro_batch_size,
                            lambda logits, micro: next_token_logprobs(logits, micro["tokens"]))
        sums = torch.stack((-(logprobs.cpu() * batch["response_mask"]).sum(), batch["response_mask"].sum())).double()
    loss, count = parallel.sum_over_data(sums.to(parallel.device())).tolist()
    tokens = torch.cat([torch.tensor(example.tokens[example.response_start :]) for example in examples])
    frequency = tokens.bincount().double() / len(tokens)
    entropy = -(frequency[frequency > 0] * frequency[frequency > 0].log()).sum().item()
    return {"heldout_loss": loss / count, "heldout_perplexity": math.exp(loss / count), "unigram_entropy": entropy}


def run(config: SFTConfig) -> None:
    """The stage, inside ``ranks``."""
    stop = parallel.StopRequest()
    config.data_parallel(torch.distributed.get_world_size())
    shape, tokenizer = BloomShape.read(config.paths.model), Tokenizer(config.paths.model)
    shape.check_layout(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
    rows = load_rows(config.paths.train, "sft")
    unseen = [sft_example(row, tokenizer, config.seq_length) for row in load_rows(config.paths.heldout, "sft")]
    model = build_model(shape, config, "lm")
    checkpoint.load_weights(checkpoint.resolve(config.paths.init) / "model", model)
    learner = Learner(model, config, config.lr, config.iterations, config.warmup_iterations)

    def micro_batches(indices: list[int]) -> tuple[list[Batch], dict[str, float]]:
        return global_batch(config, [sft_example(rows[index], tokenizer, config.seq_length) for index in indices], tokenizer.pad_id)

    task = Task(Objective(("loss",), compute), micro_batches, lambda: heldout(config, learner, unseen, tokenizer.pad_id),
                headline=("loss", "heldout_loss", "unigram_entropy", "packing_efficiency", "grad_norm", "lr"))
    train(config, learner, Sampler(len(rows), config.global_batch_size, config.seed), task, stop)


if __name__ == "__main__":
    sys.exit(run_stage(SFTConfig, run))
