"""Proof that a Hugging Face folder and a Megatron checkpoint are one model: ``python -m
conversion.verify HF_FOLDER CHECKPOINT``.

HF_FOLDER is what was converted, or what was exported. Writes HF_FOLDER/PROOF.json: for each tensor
the sha256 of its bytes on both sides (the checkpoint's after padding is cut and its type is the
folder's), and the largest difference of the logits (or scores) that transformers and our model on
megatron-core compute for one fixed batch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path

import torch
import transformers

from conversion import classifier, huggingface, torch_dist
from conversion.command import main
from conversion.intact import Intact
from conversion.megatron_to_hf import find_checkpoint
from conversion.tensors import Rows, raw
from training.checkpoint import format
from training.config.shape import Shape, family
from training.config.trainers import Paths, SFTConfig
from training.distributed.groups import device, ranks
from training.errors import ConfigError, Damaged
from training.files import atomic
from training.trainer.step import build_model, evaluate

ROWS, LENGTH, SEED = 2, 32, 0
"""The fixed batch: random tokens from a seeded generator."""
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest difference allowed, as a share of the largest logit: fp32 rounding; bf16 has 8 bits, and
the two add in another order."""
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def digest(tensor: Rows, dtype: torch.dtype) -> str:
    """sha256 of a tensor's bytes as ``dtype``."""
    made = hashlib.sha256()
    for block in tensor.blocks(dtype):
        made.update(memoryview(raw(block).numpy()))
    return made.hexdigest()


def compare(original: dict[str, Rows], converted: dict[str, Rows]) -> dict[str, dict]:
    """Name -> both sides' sha256."""
    result = {}
    for name, tensor in original.items():
        pair = digest(tensor, tensor.dtype), digest(converted[name], tensor.dtype)
        result[name] = (
            {"sha256": pair[0]} if pair[0] == pair[1] else {"sha256": pair[0], "checkpoint": pair[1], "differs": True}
        )
    return result


@torch.no_grad()
def difference(folder: Path, source: Path, shape: Shape, head: str, precision: str) -> dict:
    """Largest |difference| of transformers' and our outputs, and the largest |output|. Inside
    ``ranks(1, 1)``."""
    tokens = torch.randint(0, shape.vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED))
    kind = getattr(
        transformers,
        family(shape.family).HUGGING_FACE + ("ForSequenceClassification" if head == "scalar" else "ForCausalLM"),
    )
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    reference = kind.from_pretrained(folder, dtype=dtype).to(device()).eval()
    if head == "scalar":  # no token of the batch is padding: the score is that of whole rows
        padding = reference.config.pad_token_id
        tokens[tokens == padding] = (padding + 1) % shape.vocab
    expected = reference(input_ids=tokens.to(device())).logits.float().cpu()
    del reference
    trainer = SFTConfig(
        paths=Paths("", "", "", "", ""), precision=precision, micro_batch_size=ROWS, global_batch_size=ROWS
    )
    model = build_model(shape, trainer, "scalar" if head == "scalar" else "lm")
    format.load_weights(source, model)
    outputs = []
    evaluate(
        model,
        {"tokens": tokens},
        ROWS,
        lambda output, micro: _keep(outputs, output if head == "scalar" else output.logits()),
    )
    converted = (
        outputs[0][:, -1:] + shape.score_bias * classifier.calibration(source)
        if head == "scalar"
        else outputs[0][..., : shape.vocab]
    )
    return {
        "max_difference": (converted - expected).abs().max().item(),
        "max_value": expected.abs().max().item(),
        "precision": precision,
        "rows": ROWS,
        "tokens": LENGTH,
        "seed": SEED,
    }


def _keep(outputs: list, output: torch.Tensor) -> torch.Tensor:
    outputs.append(output.float().cpu())
    return torch.zeros(ROWS, LENGTH)


def verify(folder: Path, path: Path, precision: str) -> dict:
    """Compare and write PROOF.json -> its content. Inside ``ranks(1, 1)``; ``precision`` "none"
    leaves the logits out."""
    shape = Shape.read(folder)
    head, original = huggingface.read(folder, shape)
    source = find_checkpoint(path)
    if torch_dist.head_in(source) != head:
        raise ConfigError(f"{folder} has a {head} head, {source} a {torch_dist.head_in(source)} one: two models")
    Intact(source).check()
    converted = torch_dist.read(source, shape, head)
    if head == "scalar" and shape.score_bias:
        original.pop("score.bias")
        converted = classifier.without_bias(
            converted, shape, original["score.weight"].dtype, classifier.calibration(source)
        )
    proof = {"checkpoint": str(path), "head": head, "tensors": compare(original, converted)}
    proof["equal"] = not any("differs" in row for row in proof["tensors"].values())
    proof["proved"] = proof["equal"]
    if precision != "none":
        proof["logits"] = difference(folder, source, shape, head, precision)
        proof["logits"]["tolerance"] = TOLERANCE[precision] * proof["logits"]["max_value"]
        proof["proved"] &= proof["logits"]["max_difference"] <= proof["logits"]["tolerance"]
    proof["versions"] = {
        package: importlib.metadata.version(package) for package in ("torch", "megatron-core", "transformers")
    }
    atomic.write_text(folder / "PROOF.json", json.dumps(proof, indent=1) + "\n")
    return proof


def run(options) -> None:
    folder = Path(options.folder)
    for name, value in ONE_RANK.items():
        os.environ.setdefault(name, value)
    with ranks(1, 1, 0, init_method=f"file://{os.path.abspath(folder)}/.verify-{os.getpid()}"):
        proof = verify(folder, Path(options.checkpoint), options.logits)
    count, logits = len(proof["tensors"]), proof.get("logits")
    sentence = (
        f"; largest difference of {'scores' if proof['head'] == 'scalar' else 'logits'} {logits['max_difference']:.2g}"
        if logits
        else ""
    )
    if not proof["proved"]:
        differing = [name for name, row in proof["tensors"].items() if "differs" in row]
        raise Damaged(
            f"{folder}: not the same model: {len(differing)} of {count} "
            f"tensors differ {differing[:3]}{sentence}; see PROOF.json"
        )
    print(f"{folder}: {count} tensors equal, byte for byte{sentence}; PROOF.json written", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m conversion.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", help="Hugging Face folder: what was converted, or what was exported")
    parser.add_argument(
        "checkpoint", help="Megatron checkpoint: stage folder (its latest), iter_... folder or model folder"
    )
    parser.add_argument(
        "--logits",
        choices=("fp32", "bf16", "none"),
        default="fp32",
        help="compute both models' logits in this precision (memory: both models); none = the tensors alone",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(None, run, arguments(), lambda options: options))
