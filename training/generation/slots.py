"""The engine's state of each running row, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.generation.scheduler import Row


class BatchState:
    """State of each running row on the device, so that a decode step needs nothing from the host.
    The last slot, number ``rows``, belongs to no row: fillers use it.

    ``table`` (slots, pages of the longest row) int32; the others (slots,): ``last`` sampled token,
    ``position`` it goes to, ``step`` (response tokens so far), ``temperature``, ``top_k``,
    ``top_p``, ``penalty``; ``uniforms`` (slots, steps); ``seen`` (slots, V) bool.
    """

    def __init__(self, rows: int, pages: int, steps: int, vocab: int, penalised: bool, device: torch.device):
        def make(*shape, dtype=torch.int64):
            return torch.zeros(rows + 1, *shape, dtype=dtype, device=device)

        self.device = device
        self.table = make(pages, dtype=torch.int32)
        self.last, self.position, self.step, self.top_k = make(), make(), make(), make()
        self.temperature, self.top_p, self.penalty = (make(dtype=torch.float32) for _ in range(3))
        self.uniforms = make(steps, dtype=torch.float32)
        self.seen = make(vocab, dtype=torch.bool) if penalised else None

    def put(self, values: Sequence, dtype: torch.dtype) -> torch.Tensor:
        """Copy numbers from the host to the device without waiting for it."""
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def enter(self, rows: list[Row]) -> None:
        """Fill in the slots of rows that were just admitted."""
        slots = self.put([row.slot for row in rows], torch.int64)
        samplings = [row.request.sampling for row in rows]
        for name, values in {
            "last": [row.text(row.length - 1, 1)[0] for row in rows],
            "position": [row.length - 1 for row in rows],
            "step": [row.launched for row in rows],
            "top_k": [sampling.top_k for sampling in samplings],
            "top_p": [sampling.top_p for sampling in samplings],
            "temperature": [sampling.temperature for sampling in samplings],
            "penalty": [sampling.repetition_penalty for sampling in samplings],
        }.items():
            tensor = getattr(self, name)
            tensor[slots] = self.put(values, tensor.dtype)
        drawn = torch.zeros(len(rows), self.uniforms.size(1))
        for row, target in zip(rows, drawn, strict=True):
            if row.request.uniforms is not None:
                uniforms = row.request.uniforms[: len(target)]  # greedy rows may have fewer than steps
                target[: len(uniforms)] = uniforms
        self.uniforms[slots] = self.put(drawn, torch.float32)
        if self.seen is not None:
            self.seen[slots] = False
            owners = [row.slot for row in rows for _ in range(row.length)]
            tokens = [token for row in rows for token in row.text(0, row.length)]
            self.seen[self.put(owners, torch.int64), self.put(tokens, torch.int64)] = True
        self.pages_of(rows)

    def pages_of(self, rows: list[Row]) -> None:
        """Update the rows' page tables after they got pages."""
        table = torch.zeros(len(rows), self.table.size(1), dtype=torch.int32)
        for row, target in zip(rows, table, strict=True):
            target[: len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)
        self.table[self.put([row.slot for row in rows], torch.int64)] = self.put(table, torch.int32)

    def sampled(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """One step further: ``tokens`` (B,) follow in ``slots`` (B,)."""
        self.last[slots] = tokens
        self.position[slots] += 1
        self.step[slots] += 1
        if self.seen is not None:
            self.seen[slots, tokens] = True
