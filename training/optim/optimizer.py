"""megatron-core's distributed optimizer and schedule, made to resume with torch's Adam and at any
layout."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_param_groups_and_buffers,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from training.config.trainers import TrainerConfig
from training.errors import InvariantError
from training.models import norms
from training.optim.adamw import SplitAdamW
from training.optim.boxes import box, boxes

CONFIGURED = ("lr", "max_lr", "min_lr", "betas", "eps", "weight_decay", "start_wd", "end_wd", "fused", "foreach")
"""Entries of a parameter group that this run decides; a checkpoint does not restore them."""
TIED = (1 << 31) - 1
"""The tied embedding's number among the parameters, on every pipeline stage that holds it."""


class ReshardableOptimizer(DistributedOptimizer):
    """megatron-core 0.16.1's distributed optimizer with checkpoints that any TP x PP x DP loads,
    written without communication.

    Each data-parallel rank owns a range of every parameter's flattened elements. megatron-core
    would gather these on rank 0 (12 bytes a parameter through the network at every save) to write
    whole tensors. Here a range is cut into at most three boxes of the tensor (the end of a row,
    whole rows, the start of a row; 2-D case), which torch's checkpoint format stores and cuts again
    for any other layout: each rank writes, and reads in place, only what it owns.

    It saves and restores torch's AdamW by itself. torch keeps ``step`` per parameter, Apex and
    Transformer Engine once a group. megatron-core decides which it has by what is installed, not by
    the optimizer's class, and on loading gives all parameters one shared ``step`` tensor, which
    then grows by the number of parameters a step (distrib_optimizer.py lines 640, 672, 818).

    The step is split in two so that the host never waits for the GPU in between. Gradients stay
    sums; ``scale`` (one number on the device, 1 / tokens) and the clipping factor are applied while
    they are read. The norm is returned as a tensor.
    """

    scale: torch.Tensor | None = None
    """Factor of the gradients; None = 1."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_stub_optimizer or not isinstance(self.optimizer, SplitAdamW):
            return
        # The tied embedding has a copy on the first and on the last stage. Both must draw the same
        # rounding noise, or they drift apart.
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
        """Return the norm () of the scaled gradients, before clipping.

        No weight has changed yet: the caller decides whether ``update`` follows.
        """
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
        """Make the next update multiply all gradients by ``factor``."""
        if isinstance(self.optimizer, SplitAdamW):
            self.optimizer.factor = factor
        elif self.optimizer.defaults.get("fused"):
            self.optimizer.grad_scale, self.optimizer.found_inf = 1 / factor, torch.zeros_like(factor)
        else:
            torch._foreach_mul_([parameter.grad for parameter in self.get_parameters()], factor)

    def own_tensors(self) -> list[torch.Tensor]:
        """Return the tensors that this optimizer keeps in addition to the model's weights.

        States that do not exist yet are created.
        """
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
        """Yield (parameter, ranges) of each parameter of which this rank owns elements."""
        buckets = (bucket for maps in self.gbuf_ranges for buckets in maps.values() for bucket in buckets)
        return (item for bucket in buckets for item in bucket["param_map"].items())

    def _init_optimizer_states_with_dummy_values(self):
        """Create the states of an optimizer that has made no step.

        megatron-core makes a step with gradients of zero, which needs their memory once more.
        """
        if isinstance(self.optimizer, SplitAdamW):
            self.optimizer.initialise()
        elif not isinstance(self.optimizer, torch.optim.AdamW):
            groups = self.optimizer.param_groups
            rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = 0.0  # megatron-core's step must move no weight
            super()._init_optimizer_states_with_dummy_values()
            for group, rate in zip(groups, rates, strict=True):
                group["lr"], group["step"] = rate, 0
        else:
            for parameter in self.get_parameters():
                self.optimizer.state[parameter] = {
                    "step": self._step_tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    def _get_main_param_and_optimizer_states(self, model_param):
        if not isinstance(self.optimizer, SplitAdamW):
            return super()._get_main_param_and_optimizer_states(model_param)
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]

    def _step_tensor(self, step: float) -> torch.Tensor:
        """Return torch's AdamW's ``step`` of one parameter, on the device where its step reads
        it."""
        device = torch.cuda.current_device() if self.optimizer.defaults.get("fused") else "cpu"
        return torch.tensor(step, dtype=torch.float32, device=device)

    def sharded_state_dict(self, model_sharded_state_dict, is_loading=False, **_):
        # States are missing before a load, and in a save before the first step (PPO's policy while
        # the value model warms up).
        if not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return {**self.state_dict(), "param_state": dict(self._boxes(model_sharded_state_dict))}

    def state_dict(self):
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return super().state_dict()  # Apex's or Transformer Engine's
        param_groups = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        if not isinstance(self.optimizer, SplitAdamW):  # which keeps its step in the groups
            steps = {state["step"].item() for state in self.optimizer.state.values()}
            if len(steps) != 1:
                raise InvariantError(f"the parameters of one optimizer have made different steps: {sorted(steps)}")
            step = steps.pop()
            param_groups = [{**group, "step": step} for group in param_groups]
        return {"optimizer": {"param_groups": param_groups}}

    def load_state_dict(self, state_dict):
        """Restore the parameter groups and their steps.

        The tensors of ``param_state`` are this optimizer's own: the load has filled them already.
        ``CONFIGURED`` entries stay this run's, because a resume may change them and megatron-core's
        schedule prefers the groups' values to its own.
        """
        configured = {
            _kind(group): {name: group[name] for name in CONFIGURED if name in group}
            for group in self.optimizer.param_groups
        }
        if isinstance(self.optimizer, torch.optim.AdamW):
            self._load_torch(state_dict["optimizer"]["param_groups"])
        else:
            super().load_state_dict({name: value for name, value in state_dict.items() if name != "param_state"})
        for group in self.optimizer.param_groups:
            group.update(configured[_kind(group)])

    def _load_torch(self, saved_groups: list[dict]) -> None:
        by_kind = {_kind(group): group for group in saved_groups}
        for group in self.optimizer.param_groups:
            group.update(by_kind[_kind(group)])
            if not isinstance(self.optimizer, SplitAdamW):
                for parameter in group["params"]:
                    self.optimizer.state[parameter]["step"] = self._step_tensor(group["step"])

    def _boxes(self, model_sharded_state_dict):
        """Yield (name, ShardedTensor) of each box of each state that this rank owns.

        Their data are views of the optimizer's tensors.
        """
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
                        box(
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


def make_optimizer(
    model_chunks: list[DistributedDataParallel], trainer: TrainerConfig, lr: float
) -> ReshardableOptimizer:
    """AdamW over fp32 weights (training.optim.adamw's under optimizer_precision "bf16"), its state
    sharded over data-parallel ranks; no weight decay on biases and norms. ``lr`` is the peak.

    The optimizer is built here, as ``get_megatron_optimizer`` of megatron-core 0.16.1 does for a
    dense model: that function takes neither the class of the optimizer nor that of its Adam, and
    chooses Transformer Engine's or Apex's wherever one is installed.
    """
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
    # megatron-core then leaves the weights to the optimizer. Its own switch demands Transformer
    # Engine when the object is made.
    config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = trainer.optimizer_precision == "bf16"
    param_groups, buffers = _get_param_groups_and_buffers(
        model_chunks,
        model_chunk_offset=0,
        config=config,
        config_overrides=get_standard_config_overrides(config),
        filter_fn=lambda group: True,
        buffer_name="buffers",
    )
    if any(group["is_expert_parallel"] for group in param_groups):
        raise InvariantError("a dense model has no expert-parallel parameters")
    process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(None, model_chunks)
    optimizer = ReshardableOptimizer(
        _make_adam(param_groups, trainer, lr) if param_groups else None,
        config,
        grad_scaler=None,
        init_state_fn=None,
        model_chunks=model_chunks,
        per_model_buffers=buffers,
        data_parallel_group=process_groups["intra_dp_cp_group"],
        data_parallel_group_gloo=process_groups["intra_dp_cp_group_gloo"],
        data_parallel_group_idx=process_groups["mp_group"].rank(),
        distributed_optimizer_instance_id=0,
    )
    # megatron-core sets these two from outside as well.
    optimizer.grad_stats_parallel_group = process_groups["intra_dist_opt_group"]
    optimizer.tp_group = parallel_state.get_tensor_model_parallel_group()
    return optimizer


def _make_adam(param_groups: list[dict], trainer: TrainerConfig, lr: float) -> torch.optim.Optimizer:
    betas = (trainer.adam_beta1, trainer.adam_beta2)
    arguments = {"lr": lr, "weight_decay": trainer.weight_decay, "betas": betas, "eps": trainer.adam_eps}
    if trainer.fused != "torch":
        return norms.adam(trainer.fused)(param_groups, adam_w_mode=True, **arguments)
    if trainer.optimizer_precision == "bf16":
        return SplitAdamW(param_groups, **arguments)
    # 58 -> 35 ms a step at 1b7 on an H200
    return torch.optim.AdamW(param_groups, fused=True if torch.cuda.is_available() else None, **arguments)


def make_schedule(
    optimizer, trainer: TrainerConfig, lr: float, steps: int, warmup_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up to ``lr``, then decay to ``min_lr`` over ``steps`` optimizer steps. Step k
    (from 1) uses the rate after k ticks.

    The schedule also excludes biases and norms from weight decay: without it every parameter
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
