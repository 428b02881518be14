"""One optimizer step, and one forward pass over many rows, on megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from training.config.shape import Shape
from training.config.trainers import TrainerConfig
from training.distributed import groups
from training.errors import InvariantError
from training.models.attention import Documents
from training.models.language_model import Interleaved, LanguageModel, documents_of, model_chunks, transformer_config
from training.models.linear import accumulate
from training.models.norms import describe
from training.optim.offload import Offloaded
from training.optim.optimizer import make_optimizer, make_schedule
from training.trainer.update_guard import Guard

Batch = dict[str, torch.Tensor]
"""Tensors of one micro-batch, rows first; "tokens" (B, T) is always there, "documents" (B, T) where
rows are packed."""
Read = Callable[[torch.Tensor, Batch], torch.Tensor]
"""(a model's output, its micro-batch) -> numbers (B, T); runs on the last pipeline stage only."""


@dataclass(frozen=True)
class Objective:
    """A loss: ``compute(output, batch)`` -> (loss summed over ``count``, count, sums
    (len(names),)).

    The gradient is that of (sum of losses) / (sum of counts) over the whole global batch; the
    reported numbers are ``sums / count`` in the same sense. Runs on the last pipeline stage only.
    """

    names: tuple[str, ...]
    compute: Callable[[torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def build_model(shape: Shape, trainer: TrainerConfig, head: str) -> LanguageModel | Interleaved:
    """This rank's part of the model on its device, weights uninitialised."""
    config = transformer_config(shape, trainer, head)
    return Interleaved(config, shape, head) if trainer.virtual_pipeline > 1 else LanguageModel(config, shape, head)


class Learner:
    """A model that is trained: its gradients, optimizer and schedule. Load the weights before: the
    optimizer copies them."""

    def __init__(
        self, model: LanguageModel | Interleaved, trainer: TrainerConfig, lr: float, steps: int, warmup_steps: int
    ):
        self.model = model
        data_parallel = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.wrapped = [DistributedDataParallel(model.config, data_parallel, part) for part in model_chunks(model)]
        accumulate(model)
        self.optimizer = make_optimizer(self.wrapped, trainer, lr)
        self.schedule = make_schedule(self.optimizer, trainer, lr, steps, warmup_steps)
        self.guard = Guard(trainer)
        self.offloaded: Offloaded | None = None
        if groups.is_main():
            layout = f"TP {trainer.tensor_parallel} x PP {trainer.pipeline_parallel} x DP {groups.data_ranks()}"
            layout += f", {trainer.virtual_pipeline} parts a stage" if trainer.virtual_pipeline > 1 else ""
            print(
                f"{layout} on {groups.device().type}, {trainer.precision}; "
                f"{describe(model.config.core_attention, trainer.fused)}; recompute: {trainer.recompute}",
                flush=True,
            )
        # Without these no gradient is reduced over ranks, and nothing complains.
        model.config.finalize_model_grads_func = self._reduce
        model.config.grad_scale_func = self.optimizer.scale_loss

    def offload(self) -> None:
        """From now on the optimizer's state is on the device, and gradients have memory, only
        between ``wake`` or a step and ``sleep``."""
        for part in self.wrapped:
            part.offload_grad_buffers(synchronize=False, empty_cache=False)
        self.offloaded = Offloaded(self.optimizer.own_tensors())

    def wake(self) -> None:
        """Begin to bring the optimizer's state, if that is ahead of the next step. Nothing to do
        unless offloaded."""
        if self.offloaded:
            self.offloaded.prefetch()

    def ready(self, changed: bool) -> None:
        """The optimizer's state is on the device for whatever is launched next; ``changed``: which
        writes it."""
        if self.offloaded:
            self.offloaded.wait()
            self.offloaded.changed |= changed

    def sleep(self, then: Learner | None = None) -> None:
        """Until the next step the device's memory is others'. ``then``: a learner that wakes
        meanwhile. Nothing to do unless offloaded."""
        if self.offloaded:
            for part in self.wrapped:
                part.offload_grad_buffers(synchronize=False, empty_cache=False)
            self.offloaded.offload(then.offloaded if then else None)

    def step(self, micro_batches: list[Batch], objective: Objective) -> dict[str, float]:
        """Forward, backward and update over this data-parallel rank's ``micro_batches`` -> the
        objective's means, lr, grad_norm, and "skipped_updates": 1 where loss or gradient were not
        fit to be used, and nothing has changed.

        Raises FloatingPointError, on every rank, where that happened too often in a row.
        """
        self.ready(changed=True)
        for part in self.wrapped:
            part.restore_grad_buffers(synchronize=False)
            part.zero_grad_buffer()
            part.train()
        self.optimizer.zero_grad()
        sums = _schedule(self.wrapped, micro_batches, partial(_loss, objective), forward_only=False)
        # The host waits for the GPU here and nowhere before: an update must be refused before it is
        # made.
        norm = self.optimizer.gradient_norm()
        metrics, grad_norm = _means(sums, objective.names), norm.item()
        if update := self.guard.admits(metrics, grad_norm):
            self.schedule.step(1)
            self.optimizer.update(norm)
        return {
            **metrics,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm,
            "skipped_updates": float(not update),
        }

    def _reduce(self, model: list, tokens: torch.Tensor, **kwargs) -> None:
        """Sum the gradients over ranks. They stay sums over tokens: the optimizer divides by
        ``tokens``, this rank's, while it reads them (megatron-core asks whether there are any, for
        which the host waits, and goes through all gradients once more)."""
        finalize_model_grads(model, None, **kwargs)
        self.optimizer.scale = 1 / groups.sum_over_data(groups.from_last_stage(tokens)).clamp(min=1).float()


@torch.no_grad()
def evaluate(model: torch.nn.Module | list, batch: Batch, micro_batch_size: int, read: Read) -> torch.Tensor:
    """``read(output, micro_batch)`` (B, T) fp32 for every row of ``batch``, in order, on every
    pipeline stage; no gradients.

    ``model``: what build_model made, or a Learner's ``wrapped``. Rows beyond a multiple of
    ``micro_batch_size`` are filled up by repetition (pipeline messages have one shape) and cut
    again.
    """
    # The interleaved schedule takes micro-batches in groups of the pipeline's size.
    group = parallel_state.get_pipeline_model_parallel_world_size() if len(model_chunks(model)) > 1 else 1
    return look(model, split(batch, micro_batch_size, group), read)[: batch["tokens"].size(0)]


@torch.no_grad()
def look(model: torch.nn.Module | list, micro_batches: list[Batch], read: Read) -> torch.Tensor:
    """``evaluate`` over micro-batches of one shape (R, T), made by the caller -> (all their rows,
    T)."""
    pieces = model_chunks(model)
    for piece in pieces:
        piece.eval()
    results = _schedule(pieces, micro_batches, lambda micro, output: read(output, micro), forward_only=True)
    rows, length = micro_batches[0]["tokens"].shape
    shape = (len(micro_batches) * rows, length)
    values = (
        torch.cat(results).float().contiguous() if groups.last_stage() else torch.empty(shape, device=groups.device())
    )
    return groups.from_last_stage(values)


def split(batch: Batch, size: int, group: int = 1) -> list[Batch]:
    """Micro-batches of exactly ``size`` rows, a multiple of ``group`` of them; what is missing are
    copies of the last row."""
    rows = batch["tokens"].size(0)
    index = torch.arange(-(-rows // (size * group)) * size * group).clamp(max=rows - 1)
    return [{name: tensor[part.to(tensor.device)] for name, tensor in batch.items()} for part in index.split(size)]


def _schedule(pieces: list, micro_batches: list[Batch], on_output: Callable, forward_only: bool) -> list:
    """megatron-core's schedule (1F1B, interleaved or without pipeline) over the micro-batches ->
    what ``on_output`` gave, on the last stage. ``pieces``: this rank's parts of the model, one but
    for the interleaved schedule."""

    def forward_step(feed, model):
        micro, documents = feed.take()
        output = model(micro["tokens"], documents)
        feed.prepare()
        return output, partial(_call, on_output, micro)

    rows, length = micro_batches[0]["tokens"].shape
    # all before the first: a copy from pageable memory waits for what runs
    placed = [on_device(micro) for micro in micro_batches]
    feeds = [_Feed(placed, piece.config) for piece in pieces]
    single = len(pieces) == 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=feeds[0] if single else feeds,
        model=pieces[0] if single else pieces,
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


class _Feed:
    """A model part's micro-batches in turn, each with what attention makes of its documents. That
    is made while the GPU computes the micro-batch before: the pipeline's schedule waits for the GPU
    after each message, and whatever the host does then, the GPU waits for."""

    def __init__(self, micro_batches: list[Batch], config):
        self.left, self.config = iter(micro_batches), config
        self.prepare()

    def prepare(self) -> None:
        """The next micro-batch, if there is one."""
        micro = next(self.left, None)
        self.ready = micro and (micro, documents_of(self.config, micro["tokens"], micro.get("documents")))

    def take(self) -> tuple[Batch, Documents | None]:
        if not self.ready:
            raise InvariantError("the schedule asks for more micro-batches than there are")
        return self.ready


def on_device(batch: Batch) -> Batch:
    """Copies that don't wait where the batch is in pinned memory."""
    return {name: values.to(groups.device(), non_blocking=True) for name, values in batch.items()}


def _call(on_output, micro, output, non_loss_data: bool = False):
    return on_output(micro, output)


def _loss(objective: Objective, micro: Batch, output: torch.Tensor):
    loss, count, sums = objective.compute(output, micro)
    count = count.to(torch.int)
    return loss, count, torch.cat((count.double()[None], sums.detach().double()))


def _means(sums: list[torch.Tensor], names: tuple[str, ...]) -> dict[str, float]:
    total = (
        torch.stack(sums).sum(0) if sums else torch.zeros(1 + len(names), dtype=torch.double, device=groups.device())
    )
    if groups.last_stage():
        groups.sum_over_data(total)
    count, *values = groups.from_last_stage(total).tolist()
    if count <= 0:
        raise InvariantError("the global batch has no token or pair to learn from")
    return {name: value / count for name, value in zip(names, values, strict=True)}
