"""What the tests of the rollout engine share: small models, their weights by megatron-core's names, engines on one process."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BloomForCausalLM, LlamaForCausalLM

from conversion.weights import entries, stored_name
from training.generation import torch_ops
from training.generation.decoder import Decoder
from training.generation.engine import Engine, Limits
from training.generation.replicas import family
from training.generation.request import Request, Sampling
from training.shape import Shape


def decoder(folder: Path, model: BloomForCausalLM | LlamaForCausalLM, ops=torch_ops, dtype=torch.float32, device="cpu") -> Decoder:
    """The engine's forward pass on a Hugging Face model's own tensors."""
    shape = Shape.read(folder)
    state = {name: tensor.to(device, dtype) for name, tensor in model.state_dict().items()}
    weights = {}
    for entry in entries(shape):  # several parts: their rows in turn, group by group
        parts = [state[stored_name(shape, name)] for name in entry.parts]
        grouped = [part.view(entry.weight.groups, -1, *part.shape[1:]) for part in parts]
        weights[entry.parameter] = parts[0] if len(parts) == 1 else torch.cat(grouped, 1).flatten(0, 1)
    return family(shape).Decoder(shape, weights, ops)


def prompts(count: int, vocab: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in lengths]


def greedy(model: BloomForCausalLM, prompt: list[int], steps: int, eos: int | None, **options) -> list[int]:
    """Hugging Face's greedy response to one prompt alone, its EOS included."""
    tokens = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=steps,
                              eos_token_id=eos, pad_token_id=3, use_cache=True, **options)
    return made[0, len(prompt):].tolist()


def generate(made: Decoder, asked: list[list[int]], sampling: Sampling, eos: int = -1, uniforms=None, late: bool = False, decode=None,
             **limits) -> tuple[list, Engine]:
    engine = Engine(made, Limits(**{"context": 64, **limits}), eos, decode, late)
    rows = [None] * len(asked) if uniforms is None else uniforms
    return engine.generate([Request(prompt, sampling, row) for prompt, row in zip(asked, rows, strict=True)]), engine
