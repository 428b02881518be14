"""What the engine holds on the device of each running row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from training.generation.scheduler import Row


class Slots:
    """Where each running row stands, on the device, so that a decode step needs nothing from the
    host. Slot ``rows`` is nobody's.

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
        """Host numbers on the device without waiting for it."""
        tensor = torch.as_tensor(values, dtype=dtype)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def enter(self, rows: list[Row]) -> None:
        """Rows that were just admitted: all that a decode step reads of them."""
        slots = self.put([row.slot for row in rows], torch.int64)
        asked = [row.request.sampling for row in rows]
        for name, values in {
            "last": [row.text(row.length - 1, 1)[0] for row in rows],
            "position": [row.length - 1 for row in rows],
            "step": [row.launched for row in rows],
            "top_k": [one.top_k for one in asked],
            "top_p": [one.top_p for one in asked],
            "temperature": [one.temperature for one in asked],
            "penalty": [one.repetition_penalty for one in asked],
        }.items():
            tensor = getattr(self, name)
            tensor[slots] = self.put(values, tensor.dtype)
        drawn = torch.zeros(len(rows), self.uniforms.size(1))
        for row, target in zip(rows, drawn, strict=True):
            if row.request.uniforms is not None:
                given = row.request.uniforms[: len(target)]  # greedy rows may have fewer than steps
                target[: len(given)] = given
        self.uniforms[slots] = self.put(drawn, torch.float32)
        if self.seen is not None:
            self.seen[slots] = False
            owners = [row.slot for row in rows for _ in range(row.length)]
            tokens = [token for row in rows for token in row.text(0, row.length)]
            self.seen[self.put(owners, torch.int64), self.put(tokens, torch.int64)] = True
        self.pages_of(rows)

    def pages_of(self, rows: list[Row]) -> None:
        """The rows' page tables, after they got pages."""
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
