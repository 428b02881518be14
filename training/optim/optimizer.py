"""megatron-core's distributed optimizer and schedule, made to resume with torch's Adam and at any
layout."""

from __future__ import annotations

import contextlib
import functools
import math
from unittest import mock

import megatron.core.optimizer as mcore_optimizer
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer import distrib_optimizer as mcore_distributed
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from training.config.trainers import TrainerConfig
from training.errors import InvariantError
from training.models import norms
from training.optim.adamw import SplitAdamW

CONFIGURED = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay", "start_wd", "end_wd")
"""What the configuration says of a parameter group."""
TIED = (1 << 31) - 1
"""The tied embedding's number among the parameters, on whichever stage it stands."""


class ReshardableOptimizer(DistributedOptimizer):
    """megatron-core 0.16.1's distributed optimizer with checkpoints that any TP x PP x DP loads,
    written without communication.

    Each data-parallel rank owns a range of every parameter's flattened elements. megatron-core
    would gather these on rank 0 (12 bytes a parameter through the network at every save) to write
    whole tensors. Here a range is cut into at most three boxes of the tensor (the end of a row,
    whole rows, the start of a row; 2-D case), which torch's checkpoint format stores and cuts again
    for any other layout: each rank writes, and reads in place, only what it owns.

    It also restores torch's Adam, which keeps ``step`` per parameter: megatron-core expects Apex's
    or Transformer Engine's, which keep it once a group, and raises or gives all parameters one
    shared tensor that then grows by the number of parameters a step, silently (distrib_optimizer.py
    lines 642, 825, 940).

    And its step, in two halves, asks the GPU nothing: gradients stay sums, ``scale`` (one number on
    the device, 1 / tokens) and the clipping factor are applied while they are read, and the norm
    comes back as a tensor.
    """

    scale: torch.Tensor | None = None
    """What the gradients are to be multiplied by; None = 1."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_stub_optimizer or not isinstance(self.optimizer, SplitAdamW):
            return
        # The tied embedding's two copies, on the first and the last stage, must be rounded alike or
        # they drift apart.
        numbers = {
            parameter: TIED if getattr(parameter, "shared_embedding", False) else (index << 20) + number
            for index, buffer in enumerate(self.buffers)
            for number, parameter in enumerate(buffer.params)
        }
        for parameter, owned in self._owned():
            group, order = self.model_param_group_index_map[parameter]
            self.optimizer.param_groups[group]["params"][order].place = (numbers[parameter], owned["param"].start)

    @torch.no_grad()
    def gradient_norm(self) -> torch.Tensor:
        """The norm () of the scaled gradients, before clipping. Nothing has changed yet: ``update``
        may follow or not."""
        self.prepare_grads()
        grads = self.get_main_grads_for_grad_norm()
        square = torch.zeros((), device=torch.cuda.current_device())
        if grads:
            square += torch.stack(torch._foreach_norm(grads, 2, torch.float32)).square().sum()
        dist.all_reduce(square, group=self.get_grad_stats_parallel_group())
        return square.sqrt() * (1.0 if self.scale is None else self.scale)

    @torch.no_grad()
    def update(self, norm: torch.Tensor) -> None:
        """Clip the gradients, whose ``gradient_norm`` is ``norm``, and update the weights."""
        scale = torch.ones_like(norm) if self.scale is None else self.scale
        if not self.is_stub_optimizer:
            self._apply(scale * (self.config.clip_grad / (norm + 1e-6)).clamp(max=1.0))
        self.step_with_ready_grads()

    def _apply(self, factor: torch.Tensor) -> None:
        """Have the update multiply all gradients by ``factor``."""
        if isinstance(self.optimizer, SplitAdamW):
            self.optimizer.factor = factor
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale, self.optimizer.found_inf = 1 / factor, torch.zeros_like(factor)
        else:
            torch._foreach_mul_([parameter.grad for parameter in self.get_parameters()], factor)

    def held(self) -> list[torch.Tensor]:
        """What this optimizer keeps beside the model's weights, made now if it does not exist
        yet."""
        if self.is_stub_optimizer:
            return []
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in self.buffers}
        states = [
            value
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
        return [
            tensor for tensor in (*self.get_parameters(), *states) if tensor.untyped_storage().data_ptr() not in weights
        ]

    def _owned(self):
        """(parameter, ranges) of each parameter of which this rank owns elements."""
        buckets = (bucket for maps in self.gbuf_ranges for buckets in maps.values() for bucket in buckets)
        return (item for bucket in buckets for item in bucket["param_map"].items())

    def _init_optimizer_states_with_dummy_values(self):
        """megatron-core steps with gradients of zero, which takes their memory once more."""
        if isinstance(self.optimizer, SplitAdamW):
            self.optimizer.initialise()
        elif not isinstance(self.optimizer, torch.optim.AdamW):
            groups = self.optimizer.param_groups
            rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = 0.0  # its step must move no weight
            super()._init_optimizer_states_with_dummy_values()
            for group, rate in zip(groups, rates, strict=True):
                group["lr"], group["step"] = rate, 0
        else:
            where = torch.cuda.current_device() if self.optimizer.defaults.get("fused") else "cpu"
            for parameter in self.get_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=where),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def _get_main_param_and_optimizer_states(self, model_param):
        if not isinstance(self.optimizer, SplitAdamW):
            return super()._get_main_param_and_optimizer_states(model_param)
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]

    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, **_):
        # about to be loaded, or saved before its first step: PPO's policy while the value model
        # warms up
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return {**self.state_dict(), "param_state": dict(self._boxes(model_sharded_state_dict))}

    def state_dict(self):
        if not isinstance(self.optimizer, SplitAdamW):
            return super().state_dict()
        return {
            "optimizer": {
                "param_groups": [
                    {name: value for name, value in group.items() if name != "params"}
                    for group in self.optimizer.param_groups
                ]
            }
        }

    def load_state_dict(self, state_dict):
        """Steps; the tensors of ``param_state`` are this optimizer's own and were filled by the
        load. Rates, betas and decay are the configuration's, which may have been changed for the
        resume: megatron-core's schedule prefers what stands in the groups."""
        configured = {
            _kind(group): {name: group[name] for name in CONFIGURED if name in group}
            for group in self.optimizer.param_groups
        }
        self._load(state_dict)
        for group in self.optimizer.param_groups:
            group.update(configured[_kind(group)])

    def _load(self, state_dict):
        if isinstance(self.optimizer, SplitAdamW):
            saved = {_kind(group): group for group in state_dict["optimizer"]["param_groups"]}
            for group in self.optimizer.param_groups:
                group.update(saved[_kind(group)])
            return
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "param_state"})
        if isinstance(self.optimizer, torch.optim.AdamW):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    def _boxes(self, model_sharded_state_dict):
        """(name, ShardedTensor) of each box of each state that this rank owns; their data are views
        of the optimizer's tensors."""
        described = {
            tensor.data: tensor
            for tensor in nested_values(model_sharded_state_dict)
            if isinstance(tensor, ShardedTensor)
        }
        for parameter, owned in self._owned():
            like, start, stop = described[parameter], owned["param"].start, owned["param"].end
            for state, values in self._get_main_param_and_optimizer_states(parameter).items():
                if state == "step":
                    continue
                position = 0
                for number, (offset, size) in enumerate(boxes(tuple(like.local_shape), start, stop)):
                    count = math.prod(size)
                    yield (
                        f"{like.key}.{like.global_offset}.{state}.{number}",
                        _box(
                            like,
                            f"optimizer.state.{state}.{like.key}",
                            values.detach()[position : position + count],
                            offset,
                            size,
                        ),
                    )
                    position += count


def _kind(group: dict) -> tuple:
    """What tells parameter groups apart: megatron-core's multipliers of rate and decay."""
    return tuple(group[name] for name in param_group_identifier_keys)


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start``..``stop`` of a tensor in row-major order as boxes (offset, size), in that
    order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        return _in_row(shape, last, start, stop)
    whole = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if last > first else []
    return _in_row(shape, first - 1, start, first * row) + whole + _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int):
    row = math.prod(shape[1:])
    return [
        ((index, *offset), (1, *size)) for offset, size in boxes(shape[1:], start - index * row, stop - index * row)
    ]


def _box(
    like: ShardedTensor, key: str, values: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]
) -> ShardedTensor:
    """``values`` as a box of the tensor that ``like`` is this rank's part of; the layer axis that
    it may lack is spelled out."""
    extra = like.prepend_axis_num
    place = (
        *like.global_offset[:extra],
        *(base + step for base, step in zip(like.global_offset[extra:], offset, strict=True)),
    )
    size = (1,) * extra + size
    # The last number of a replica is its data-parallel rank: there every box has one owner.
    return ShardedTensor(
        key,
        values.view(size),
        values.dtype,
        size,
        tuple(like.global_shape),
        place,
        axis_fragmentations=None,
        replica_id=(*like.replica_id[:-1], 0),
        allow_shape_mismatch=like.allow_shape_mismatch,
    )


def make_optimizer(parts: list[DistributedDataParallel], trainer: TrainerConfig, lr: float):
    """AdamW over fp32 weights (training.optim.adamw's under optimizer_precision "bf16"), state
    sharded over data-parallel ranks; no decay on biases and norms. ``lr`` is the peak."""
    dtype = torch.bfloat16 if trainer.precision == "bf16" else torch.float32
    config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=trainer.min_lr,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_eps=trainer.adam_eps,
        clip_grad=trainer.clip_grad,
        use_distributed_optimizer=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
    )
    split = trainer.optimizer_precision == "bf16"
    # megatron-core then leaves the weights to the optimizer. Its own switch asks for Transformer
    # Engine when the object is made.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = split
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(mcore_optimizer, "DistributedOptimizer", ReshardableOptimizer))
        # megatron-core looks Adam up at call time, and takes Transformer Engine's or Apex's
        # wherever one is installed. So does the part of it that reads and writes states, later on.
        torch_s = trainer.fused == "torch"
        mcore_distributed.HAVE_APEX_OR_TE = not torch_s
        patches.enter_context(mock.patch.object(mcore_optimizer, "USING_PYTORCH_OPTIMIZER", torch_s))
        if not torch_s:
            patches.enter_context(mock.patch.object(mcore_optimizer, "Adam", norms.adam(trainer.fused)))
        elif split:
            patches.enter_context(mock.patch.object(torch.optim, "AdamW", SplitAdamW))
        elif (
            torch.cuda.is_available()
        ):  # megatron-core passes torch's no ``fused``: 58 -> 35 ms a step at 1b7 on an H200
            patches.enter_context(
                mock.patch.object(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=True))
            )
        made = get_megatron_optimizer(config, parts, get_standard_config_overrides(config))
    if len(made.chained_optimizers) != 1:
        raise InvariantError(f"a dense model has one optimizer, megatron-core made {len(made.chained_optimizers)}")
    return made


def make_schedule(
    optimizer, trainer: TrainerConfig, lr: float, steps: int, warmup_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up to ``lr``, then decay to ``min_lr`` over ``steps`` optimizer steps. Step k
    (from 1) uses the rate after k ticks.

    It also applies the exclusion of biases and norms from weight decay: without it every parameter
    decays.
    """
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=lr,
        min_lr=trainer.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=steps + 1,
        lr_decay_style=trainer.schedule,
        start_wd=trainer.weight_decay,
        end_wd=trainer.weight_decay,
        wd_incr_steps=steps + 1,
        wd_incr_style="constant",
    )
