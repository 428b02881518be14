"""What every trainer begins with: shape, tokenizer and rows, the layout checked; and, where one
model learns from rows, that model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config import cost
from training.config.shape import Shape
from training.config.trainers import RolloutConfig, TrainerConfig
from training.data.batches import Example, Sampler, padded_length
from training.data.cache import TokenRows, cached
from training.data.packing import RowLimits, collate_packed, pack
from training.data.tokenizer import Tokenizer
from training.distributed import groups
from training.errors import ConfigError
from training.models.attention_backends import FLEX_BLOCK
from training.trainer.loop import SupervisedTask, train
from training.trainer.step import Batch, Learner, build_model


class Inputs(NamedTuple):
    """A trainer's inputs beside weights."""

    shape: Shape
    tokenizer: Tokenizer
    rows: TokenRows
    """Training rows, tokenised."""
    unseen: TokenRows
    """Held-out rows."""


def read_inputs(config: TrainerConfig, kind: str) -> Inputs:
    """Rows of ``kind`` ("sft", "reward" or "rlhf"). Raises ConfigError where ranks, batch or model
    can't be divided as asked."""
    config.data_parallel(dist.get_world_size())
    shape = Shape.read(config.paths.model)
    shape.check_layout(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
    shape.check_length(config.LENGTH, config.longest_row)
    tokenizer = Tokenizer(config.paths.model)
    if isinstance(config, RolloutConfig):  # what samples learns the distribution that it samples from
        shape = shape.with_tokens(tokenizer.ids)

    def rows(path: str) -> TokenRows:
        return TokenRows(groups.on_first(partial(cached, path, kind, tokenizer)))

    inputs = Inputs(shape, tokenizer, rows(config.paths.train), rows(config.paths.heldout))
    _check_lengths(config, inputs)
    return inputs


def _check_lengths(config: TrainerConfig, inputs: Inputs) -> None:
    """Say how many rows are cut. Raises ConfigError where a prompt that is cut would lose the cue
    at its end."""
    prompts, cue = isinstance(config, RolloutConfig), inputs.rows.cue
    name, most = ("prompt_length", config.prompt_length) if prompts else ("seq_length", config.seq_length)
    rest = most if prompts else most // 2
    if rest < cue:
        raise ConfigError(
            f"{name} = {most}: of a prompt that is too long the last {rest} tokens stay, "
            f"and its end, the assistant's mark, has {cue} with BOS; raise {name}"
        )
    if groups.is_main() and (cut := inputs.rows.longer_than(most)):
        print(f"{cut:,} of {len(inputs.rows):,} rows are longer than {name} = {most} and are cut", flush=True)


def learn(
    config: TrainerConfig,
    kind: str,
    head: str,
    make_task: Callable[[TrainerConfig, Inputs, Learner], SupervisedTask],
    before: Callable[[TrainerConfig, Inputs], None] = lambda config, inputs: None,
) -> None:
    """A stage in which one model learns from rows, inside ``ranks``: a model with ``head`` ("lm",
    or a new "scalar" one) and the weights of ``paths.init`` learns the task. Raises Interrupted
    after a signal, all saved."""
    signals = groups.StopRequest()
    inputs = read_inputs(config, kind)
    before(config, inputs)
    model = build_model(inputs.shape, config, head)
    format.load_weights(
        StageFolder(config.paths.init).resolve() / "model", model, fresh_head=config.seed if head == "scalar" else None
    )
    learner = Learner(model, config, config.lr, config.iterations, config.warmup_iterations)
    sampler = Sampler(len(inputs.rows), config.global_batch_size, config.seed)
    train(config, learner, sampler, make_task(config, inputs, learner), signals)


def length_multiple(config: TrainerConfig) -> int:
    """Padded lengths are multiples of this: sequence parallelism divides them, and on a GPU
    attention's kernels work in blocks."""
    if groups.device().type == "cuda":
        return math.lcm(FLEX_BLOCK, config.tensor_parallel)
    return 8 * config.tensor_parallel


def least_tokens(config: TrainerConfig, shape: Shape) -> int:
    """Of a micro-batch: fewer would take this GPU as long. 0 on the CPU."""
    if groups.device().type == "cpu":
        return 0
    peak = cost.PEAK_TFLOPS.get(torch.cuda.get_device_capability()[0], max(cost.PEAK_TFLOPS.values()))
    return cost.launched_tokens(shape, config.tensor_parallel, config.longest_row, peak)


def limits(config: TrainerConfig, shape: Shape) -> RowLimits:
    """What packed rows of a trainer with ``seq_length`` must fit: no micro-batch has more tokens
    than unpacked rows of full length."""
    return RowLimits(
        config.seq_length,
        length_multiple(config),
        groups.data_ranks(),
        config.micro_batch_size,
        config.pipeline_parallel,
        cost.group(config),
        least_tokens(config, shape),
    )


def packed(config: TrainerConfig, examples: list[Example], pad_id: int) -> tuple[Batch, torch.Tensor]:
    """Examples that are only looked at, in as few rows of ``seq_length`` as hold them -> rows as
    ``collate_packed`` makes them, (B, T), and (examples,), where each one's last token stands in
    the flattened rows."""
    lengths = [len(example.tokens) for example in examples]
    rows = pack(lengths, config.seq_length, 1)
    length = padded_length([sum(lengths[index] for index in row) for row in rows], length_multiple(config))
    ends = torch.zeros(len(examples), dtype=torch.long)
    for number, row in enumerate(rows):
        ends[row] = number * length - 1 + torch.tensor([lengths[index] for index in row]).cumsum(0)
    return collate_packed([[examples[index] for index in row] for row in rows], pad_id, length), ends
