"""What the tests of the rollout engine share: small models, their weights by megatron-core's names,
engines on one process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BloomForCausalLM, LlamaForCausalLM

from conversion.weights import entries, stored_name
from training.config.shape import VOCAB_MULTIPLE, Shape
from training.generation import sampling, torch_ops
from training.generation.engine import Engine, EngineLimits
from training.generation.request import Request, Sampling
from training.generation.rollout_workers import family
from training.models.decoder import Decoder

NONE = float("-inf")


def decoder(
    folder: Path,
    model: BloomForCausalLM | LlamaForCausalLM,
    ops=torch_ops,
    dtype=torch.float32,
    device="cpu",
    tokens: int = 0,
) -> Decoder:
    """The engine's forward pass on a Hugging Face model's own tensors; ``tokens``: ids of its
    tokenizer, 0 = one for each row of the embedding."""
    shape = Shape.read(folder)
    shape = shape.with_tokens(tokens) if tokens else shape
    state = {name: tensor.to(device, dtype) for name, tensor in model.state_dict().items()}
    weights = {}
    for entry in entries(shape):  # several parts: their rows in turn, group by group
        parts = [state[stored_name(shape, name)] for name in entry.parts]
        grouped = [part.view(entry.weight.weave_groups, -1, *part.shape[1:]) for part in parts]
        weights[entry.parameter] = parts[0] if len(parts) == 1 else torch.cat(grouped, 1).flatten(0, 1)
    return family(shape).Decoder(shape, weights, ops)


def shard(logits: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """A rank's columns (B, C) of ``logits`` (B, V), as its Decoder.logits gives them: the
    vocabulary padded to multiples of 128."""
    columns = -(-logits.size(1) // (VOCAB_MULTIPLE * ranks)) * VOCAB_MULTIPLE
    padded = F.pad(logits, (0, columns * ranks - logits.size(1)), value=NONE)
    return padded[:, rank * columns : (rank + 1) * columns].contiguous()


def pick_from_shards(ops, logits: torch.Tensor, ranks: int, temperature: torch.Tensor, uniforms: torch.Tensor):
    """training.generation.tp_sampling.choose without its messages, all ranks' parts here: tokens
    and log-probabilities (B,)."""
    parts = [shard(logits, rank, ranks) for rank in range(ranks)]
    sums = [ops.summarise(part, temperature) for part in parts]
    highest, total = (torch.cat([one[which] for one in sums], 1) for which in (0, 1))
    columns = torch.stack(
        [
            ops.pick(part, temperature, uniforms, highest, total, best, rank * best.size(1))
            for rank, (part, (_, _, best)) in enumerate(zip(parts, sums, strict=True))
        ]
    )
    mine = columns >= 0
    assert (mine.sum(0) == 1).all(), "one rank picks"
    first = torch.arange(ranks, device=logits.device)[:, None] * parts[0].size(1)
    tokens = torch.where(mine, columns + first, 0).sum(0)
    scaled = logits.gather(1, tokens[:, None]).squeeze(1) / sampling.nonzero_temperature(temperature)
    return tokens, sampling.logprob(scaled, highest, total)


def off(
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    logits: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    near: float = 1e-6,
) -> tuple[int, float]:
    """In fp64: rows whose token is not what ``logits`` (B, V) and draw ask for, and the
    log-probabilities' largest error.

    A draw that is ``near`` the border between two tokens may fall to either. Greedy: the first of
    equals.
    """
    exact = (logits.double() / sampling.nonzero_temperature(temperature)[:, None]).log_softmax(-1)
    chosen = exact.gather(1, tokens[:, None]).squeeze(1)
    after = exact.exp().cumsum(-1).gather(1, tokens[:, None]).squeeze(1)
    drawn = (chosen > NONE) & (after - chosen.exp() - near <= uniforms) & (uniforms < after + near)
    right = torch.where(temperature == 0, tokens == logits.argmax(-1), drawn)
    return int((~right).sum()), (logprobs - chosen).abs().max().item()


def prompts(count: int, vocab: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: BloomForCausalLM, prompt: list[int], steps: int, eos: int | None, **options) -> list[int]:
    """Hugging Face's greedy response to one prompt alone, its EOS included."""
    tokens = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        made = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=eos,
            pad_token_id=3,
            use_cache=True,
            **options,
        )
    return made[0, len(prompt) :].tolist()


def generate(
    made: Decoder,
    asked: list[list[int]],
    sampling: Sampling,
    eos: int = -1,
    uniforms=None,
    async_output: bool = False,
    decode=None,
    **limits,
) -> tuple[list, Engine]:
    engine = Engine(made, EngineLimits(**{"context": 64, **limits}), eos, decode, async_output)
    rows = [None] * len(asked) if uniforms is None else uniforms
    return engine.generate([Request(prompt, sampling, row) for prompt, row in zip(asked, rows, strict=True)]), engine
