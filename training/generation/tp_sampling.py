"""Sampling where each rank of a tensor-parallel group has some of the vocabulary's columns: no rank
reads another's logits.

Each rank sums its columns up, a few numbers a chunk of them. From all ranks' numbers every rank
finds the same chunk, and the rank that has it picks the token there and tells the others. Two small
messages a step instead of all logits: .13 MB, not 257, for 256 rows of 250,880 columns. Ranks can't
disagree on the chunk: they decide from the same bits, as a chunk's sums are made once, by the rank
that has it.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist

from training.generation.sampling import heat, logprob


def choose(
    ops: ModuleType, logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """What training.generation.sampling.choose gives for all columns without truncation; the same
    bits on every rank of ``group``.

    ``logits`` (B, C) fp32: this rank's columns, C the same on all ranks; -inf in those that are
    none of the vocabulary. ``temperature``, ``uniforms`` (B,), equal on all ranks. ``ops``:
    torch_ops or triton_ops.
    """
    highest, total, best = ops.summarise(logits, temperature)
    sent = torch.cat((highest, total))
    found = sent.new_empty(group.size() * len(sent), sent.size(1))
    dist.all_gather_into_tensor(found, sent, group=group)
    # (B, chunks of all ranks) each
    highest, total = found.view(group.size(), 2, *highest.shape).permute(1, 2, 0, 3).flatten(2)
    column = ops.pick(logits, temperature, uniforms, highest, total, best, group.rank() * best.size(1))
    mine = column >= 0
    scaled = logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1) / heat(temperature)
    # One rank's numbers and zeros, summed as integers: token ids of any size and every bit of the
    # logit arrive.
    picked = torch.stack((column.int() + group.rank() * logits.size(1), scaled.view(torch.int32))) * mine
    dist.all_reduce(picked, group=group)
    return picked[0].long(), logprob(picked[1].view(torch.float32), highest, total)
