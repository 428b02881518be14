"""megatron-core's linear layers, made fit for compiled layers."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


class ColumnParallel(ColumnParallelLinear):
    """megatron-core's."""


class RowParallel(RowParallelLinear):
    """megatron-core's, which looks its group up at every call and warns, and a warning breaks the graph."""

    def _forward_impl(self, input, weight, *args, **kwargs):
        return super()._forward_impl(input, weight, *args, **{**kwargs, "tp_group": self.tp_group})
