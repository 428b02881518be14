"""Decode steps as CUDA graphs: hundreds of small kernels start as one, for a few batch sizes, each
captured when it is first needed."""

from __future__ import annotations

import time

import torch

from training.generation.slots import BatchState
from training.models.kv_cache import Batch


def padded_rows(rows: int) -> int:
    """The batch size that a step of ``rows`` is filled up to: 1, 8, then multiples of 32, from 128
    on of 64.

    Up to 128 rows a step's matrix products take as long as reading the weights; each size costs a
    capture.
    """
    if rows <= 8:
        return 1 if rows == 1 else 8
    multiple = 32 if rows <= 128 else 64
    return -(-rows // multiple) * multiple


class Graphs:
    """The decoder's forward pass for the rows in given slots. Rows that fill up a batch use the
    slot and the page that belong to no row."""

    def __init__(self, decoder, cache: torch.Tensor, slots: BatchState, page: int, longest: int):
        self.decoder, self.cache, self.slots, self.page, self.longest = decoder, cache, slots, page, longest
        self.filler_slot = len(slots.last) - 1
        self.index = torch.full((padded_rows(max(self.filler_slot, 1)),), self.filler_slot, device=cache.device)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.seconds = 0.0
        """Seconds spent on capturing."""
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def hidden(self, index: torch.Tensor) -> torch.Tensor:
        """Last hidden states (B, H) of the rows in slots ``index`` (B,); good until the next
        call."""
        rows = len(index)
        size = padded_rows(rows)
        if size not in self.captured:
            self._capture(size)
        self.index[:rows] = index
        self.index[rows:size] = self.filler_slot
        graph, hidden = self.captured[size]
        graph.replay()
        return hidden[:rows]

    def _capture(self, size: int) -> None:
        torch.cuda.synchronize()
        began = time.monotonic()
        self.index[:size] = self.filler_slot
        self._forward(size)  # compiles kernels, which a capture must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not torch.cuda.graph: it also collects garbage and empties the allocator's cache, each
        # time.
        with torch.cuda.stream(self.stream):
            # "thread_local": threads that write a checkpoint or watch NCCL may go on calling CUDA.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            hidden = self._forward(size)
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        self.captured[size] = graph, hidden
        self.seconds += time.monotonic() - began

    def _forward(self, size: int) -> torch.Tensor:
        return forward(self.decoder, self.cache, self.slots, self.index[:size], self.page, self.longest)


def forward(
    decoder, cache: torch.Tensor, slots: BatchState, index: torch.Tensor, page: int, longest: int
) -> torch.Tensor:
    """One decode step up to the last hidden states (B, H): each row's last token, at its place.
    ``longest``: no row is longer."""
    position = slots.position[index]
    batch = Batch(slots.table[index], position + 1, position, page, longest)
    return decoder.last_hidden(slots.last[index], cache, batch)
