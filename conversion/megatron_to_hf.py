"""Megatron -> Hugging Face: ``python -m conversion.megatron_to_hf CHECKPOINT OUTPUT --model
HF_FOLDER`` (as a stage: ``... config.json``).

Writes folders that transformers loads: sharded safetensors with index, and config, generation
config and tokenizer of the starting checkpoint. Vocabulary padding is cut off; everything else
keeps its bits. A model with a scalar head becomes a sequence classifier (conversion/classifier.py).
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from conversion import classifier, huggingface, small_files, torch_dist, work
from conversion.command import main
from conversion.config import FOLDERS, ExportConfig, ExportPaths
from conversion.intact import Intact
from conversion.tensors import Rows, raw
from conversion.weights import embedding_name, head_of, stored_name
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.errors import ConfigError
from training.metrics.metrics import Metrics

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(config: ExportConfig) -> None:
    """Write every model's folder."""
    shape = Shape.read(config.paths.model)
    dtype = DTYPES[config.dtype] if config.dtype else starting_dtype(config.paths.model, shape)
    expected = {
        name: stage
        for name, stage in config.paths.checkpoints.items()
        if config.heads or name not in ("reward", "value")
    }
    metrics = Metrics(config.paths.output, total=len(expected))
    for number, (name, stage) in enumerate(expected.items(), 1):
        iteration = config.paths.reward_iteration if name == "reward" else 0
        saved = StageFolder(stage).resolve(iteration)
        source, target = saved / FOLDERS[name], Path(config.paths.output) / name
        export_model(
            source, target, Path(config.paths.model), shape, dtype, config.max_shard_gb, Intact(source, required=True)
        )
        metrics.log(number)
        print(f"{name}: {source} -> {target}", flush=True)
    metrics.close()


def starting_dtype(model: str | Path, shape: Shape) -> torch.dtype:
    """Type of the starting checkpoint's weights."""
    return huggingface.read(model, shape)[1][embedding_name(shape)].dtype


def export_model(
    source: Path, target: Path, model: Path, shape: Shape, dtype: torch.dtype, max_shard_gb: float, intact: Intact
) -> None:
    """One ``torch_dist`` folder; ``target`` appears when it is complete."""
    head = torch_dist.head_in(source)
    if head != "scalar" and head != head_of(shape):
        raise ConfigError(
            f"{source} has {'a tied' if head == 'tied' else 'its own'} output matrix, {model}/config.json says "
            f"tie_word_embeddings = {str(shape.tied).lower()}; give the folder that the training started from"
        )
    try:
        tensors = torch_dist.read(source, shape, head)
    except ConfigError:
        intact.check()  # a file that changed is why: say that
        raise
    places = torch_dist.sources(source, shape, head)

    def check(names: Iterable[str]) -> None:
        intact.check(sorted(set().union(*(places[name] for name in names))))

    made_from = work.described(sorted(source.iterdir()))
    added = classifier.calibration(source)
    if added and not shape.score_bias:
        print(
            f"{target.name}: {shape.family}'s classifier can't hold the model's bias: add {added:.6g} to its scores",
            flush=True,
        )
    write_folder(target, tensors, made_from, model, shape, head, dtype, max_shard_gb, check, added)


def write_folder(
    target: Path,
    tensors: dict[str, Rows],
    made_from: list,
    model: Path,
    shape: Shape,
    head: str,
    dtype: torch.dtype,
    max_shard_gb: float,
    check: Callable[[Iterable[str]], None] = lambda names: None,
    added: float = 0.0,
) -> None:
    """A Hugging Face folder of ``tensors`` (by name without prefix); other files from ``model``.
    Goes on where it was killed.

    ``check`` is called with the names of the tensors before they are read; ``added`` to a
    classifier's scores.
    """
    small_files.check(model, shape)
    if head == "scalar" and shape.score_bias:
        check(classifier.touched(shape))
        tensors = classifier.without_bias(tensors, shape, dtype, added)
    shards = huggingface.plan({name: tensor.shape for name, tensor in tensors.items()}, dtype, max_shard_gb)
    sizes = {
        file: sum(torch.Size(tensors[name].shape).numel() * dtype.itemsize for name in names)
        for file, names in shards.items()
    }
    manifest = {
        "from": made_from,
        "model": work.described([model / name for name in small_files.names(model, head)]),
        "dtype": str(dtype),
        "files": sizes,
        "added": added,
    }
    aside = target.with_name(f".{target.name}.converting")
    with work.folder(aside, manifest, sum(sizes.values())):
        writers = {
            file: partial(write, shape, {name: tensors[name] for name in names}, dtype, check)
            for file, names in shards.items()
        }
        work.write_files(aside, writers, sizes, f"export {target.name}", hashed=False)
        if len(shards) > 1:
            (aside / "model.safetensors.index.json").write_text(
                huggingface.index(shape, shards, sum(sizes.values())), encoding="utf-8"
            )
        small_files.write(model, aside, shape, head, dtype)
        work.clean(aside)
        work.replace(aside, target)


def write(
    shape: Shape, tensors: dict[str, Rows], dtype: torch.dtype, check: Callable[[Iterable[str]], None], file, count
) -> list:
    """One safetensors file."""
    check(tensors)
    stored = {stored_name(shape, name): tensor for name, tensor in tensors.items()}
    file.write(huggingface.header({name: tensor.shape for name, tensor in stored.items()}, dtype))
    for name in sorted(stored):
        for block in stored[name].blocks(dtype):
            file.write(memoryview(raw(block).numpy()))
            count(block.nbytes)
    return []


def find_checkpoint(path: Path) -> Path:
    """The ``torch_dist`` folder that a person means: itself, an iteration's folder, or a stage's
    (its latest).

    Raises ConfigError naming the folders where there are several models or none.
    """
    saved = StageFolder(path).resolve() if (path / "checkpoints").is_dir() else path
    models = [saved] if (saved / ".metadata").is_file() else sorted(file.parent for file in saved.glob("*/.metadata"))
    if len(models) != 1:
        names = ", ".join(model.name for model in models) or "none"
        raise ConfigError(
            f"{path}: models in it: {names}; give the folder of one Megatron checkpoint (with .metadata), e.g. "
            f"{models[0] if models else 'STAGE/checkpoints/iter_0000100/model'}"
        )
    return models[0]


def export_by_hand(options) -> None:
    model, target = Path(options.model), Path(options.output)
    shape = Shape.read(model)
    if target.is_dir() and any(target.iterdir()) and not options.overwrite:
        raise ConfigError(f"{target} is there and not empty; give another folder, or --overwrite")
    dtype = DTYPES[options.dtype] if options.dtype else starting_dtype(model, shape)
    source = find_checkpoint(Path(options.checkpoint))
    export_model(source, target, model, shape, dtype, options.max_shard_gb, Intact(source))
    print(f"{target}: from_pretrained loads it", flush=True)


def arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m conversion.megatron_to_hf",
        description="Megatron checkpoint (torch_dist) -> Hugging Face folder. Interrupted? Run the same again.",
    )
    parser.add_argument(
        "checkpoint", help="stage folder (its latest), iter_... folder or model folder; or a stage's config.json alone"
    )
    parser.add_argument("output", help="Hugging Face folder to write")
    parser.add_argument(
        "--model",
        required=True,
        help="Hugging Face folder of the starting model: config and tokenizer are copied from it",
    )
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as the starting model")
    parser.add_argument("--max-shard-gb", type=float, default=ExportConfig(paths=ExportPaths("", "", {})).max_shard_gb)
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it is there")
    return parser


def run(options) -> None:
    export(options) if isinstance(options, ExportConfig) else export_by_hand(options)


if __name__ == "__main__":
    sys.exit(main(ExportConfig, run, arguments(), lambda options: options))
