"""From examples (training/data/examples.py) to padded batches, and the order of the rows."""

from __future__ import annotations

import numpy as np
import torch

from training.data.examples import Example as Example
from training.data.examples import comparison_example as comparison_example
from training.data.examples import prompt_tokens as prompt_tokens
from training.data.examples import sft_example as sft_example
from training.data.permutation import Permutation
from training.errors import ConfigError, InvariantError


def padded_length(lengths: list[int], multiple: int) -> int:
    """The longest of ``lengths``, rounded up to ``multiple``. Pass the lengths of the *global*
    batch: pipeline stages and data-parallel ranks must agree on the shape of every micro-batch."""
    return -(-max(lengths) // multiple) * multiple


def collate(examples: list[Example], pad_id: int, length: int) -> dict[str, torch.Tensor]:
    """Right-padded batch: ``tokens`` (B, length) int64; ``response_mask`` (B, length) bool, True at
    the ids that are learnt, the reply's with its end; ``lengths`` (B,) int64, real ids of each
    row."""
    lengths = torch.tensor([len(example.tokens) for example in examples])
    if int(lengths.max()) > length:
        raise InvariantError(f"a row of {int(lengths.max())} tokens in a batch of length {length}")
    tokens = torch.full((len(examples), length), pad_id)
    response_mask = torch.zeros(len(examples), length, dtype=torch.bool)
    for row, mask, example in zip(tokens, response_mask, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
        for start, end in example.spans:
            mask[start:end] = True
    return {"tokens": tokens, "response_mask": response_mask, "lengths": lengths}


class Sampler:
    """Row indices of successive global batches: one seeded permutation an epoch, the same for any
    number of ranks.

    Rows left over at the end of an epoch begin the batch that the next epoch fills, so every row is
    seen once an epoch. Memory does not depend on the number of rows.
    """

    ORDER = "feistel-1"
    """Name of the rule that derives the order from seed and epoch. A checkpoint stores it, because
    another rule would give a resumed run other rows."""

    def __init__(self, n_rows: int, global_batch_size: int, seed: int):
        if n_rows < 1:
            raise ConfigError(
                f"{n_rows} training rows: expected at least 1; counts.json in the data's folder says what was dropped"
            )
        self.n_rows, self.global_batch_size, self.seed = n_rows, global_batch_size, seed
        self.epoch, self.offset = 0, 0

    def next_batch(self) -> list[int]:
        """The next ``global_batch_size`` row indices."""
        batch: list[int] = []
        while len(batch) < self.global_batch_size:
            if self.offset == self.n_rows:
                self.epoch, self.offset = self.epoch + 1, 0
            positions = np.arange(self.offset, min(self.n_rows, self.offset + self.global_batch_size - len(batch)))
            batch += Permutation(self.n_rows, f"{self.seed}/{self.epoch}")[positions].tolist()
            self.offset += len(positions)
        return batch

    def state_dict(self) -> dict[str, int | str]:
        return {"epoch": self.epoch, "offset": self.offset, "seed": self.seed, "rows": self.n_rows, "order": self.ORDER}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue from ``state``. Raises ConfigError where data, seed or the order's rule
        differ."""
        if state.get("order") != self.ORDER:
            raise ConfigError(
                f"this checkpoint's rows stand in the order {state.get('order', 'of version 0.1.0')!r}, this version's "
                f"in {self.ORDER!r}: finish the stage with the version that began it, or start the stage again from "
                "its beginning"
            )
        for name, value in (("seed", self.seed), ("rows", self.n_rows)):
            if state[name] != value:
                raise ConfigError(
                    f"{name} = {value}, but the checkpoint was made with {name} = {state[name]}; "
                    "resume with the same data and seed, or start the stage again from its beginning"
                )
        self.epoch, self.offset = state["epoch"], state["offset"]


def shard(indices: list[int], rank: int, ranks: int) -> list[int]:
    """Data-parallel rank ``rank``'s contiguous part of a global batch."""
    if len(indices) % ranks:
        raise InvariantError(f"a global batch of {len(indices)} for {ranks} data-parallel ranks")
    size = len(indices) // ranks
    return indices[rank * size : (rank + 1) * size]
