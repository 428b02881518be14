"""Sampling where each rank of a tensor-parallel group has a part of the vocabulary's columns: no
rank reads another's logits.

Each rank summarises its columns in a few numbers per chunk. From all ranks' summaries every rank
finds the same chunk, and the chunk's owner picks the token and sends it to the others. A step takes
two small messages instead of all logits: .13 MB, not 257, for 256 rows of 250,880 columns. Ranks
can't disagree on the chunk: its owner alone sums it, so all decide from the same bits.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.distributed as dist

from training.generation.sampling import logprob, nonzero_temperature


def choose(
    ops: ModuleType, logits: torch.Tensor, temperature: torch.Tensor, uniforms: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """What training.generation.sampling.choose gives for all columns without truncation; the same
    bits on every rank of ``group``.

    ``logits`` (B, C) fp32: this rank's columns, C the same on all ranks; -inf in those that are
    none of the vocabulary. ``temperature``, ``uniforms`` (B,), equal on all ranks. ``ops``:
    torch_ops or triton_ops.
    """
    chunk_max, chunk_sum, chunk_argmax = ops.summarise(logits, temperature)
    summaries = torch.cat((chunk_max, chunk_sum))
    gathered = summaries.new_empty(group.size() * len(summaries), summaries.size(1))
    dist.all_gather_into_tensor(gathered, summaries, group=group)
    # (B, chunks of all ranks) each
    chunk_max, chunk_sum = gathered.view(group.size(), 2, *chunk_max.shape).permute(1, 2, 0, 3).flatten(2)
    column = ops.pick(
        logits, temperature, uniforms, chunk_max, chunk_sum, chunk_argmax, group.rank() * chunk_argmax.size(1)
    )
    is_owner = column >= 0
    scaled = logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1) / nonzero_temperature(temperature)
    # One rank's numbers and zeros, summed as integers: token ids of any size and every bit of the
    # logit arrive.
    picked = torch.stack((column.int() + group.rank() * logits.size(1), scaled.view(torch.int32))) * is_owner
    dist.all_reduce(picked, group=group)
    return picked[0].long(), logprob(picked[1].view(torch.float32), chunk_max, chunk_sum)
