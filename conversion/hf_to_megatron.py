"""Hugging Face -> Megatron: ``python -m conversion.hf_to_megatron HF_FOLDER OUTPUT`` (or, as a
stage, ``... config.json``).

Tensor by tensor from memory-mapped files into one ``torch_dist`` checkpoint, which every TP x PP x
DP loads: no model is built and no layout is baked in. Tensors keep their data type and their bits.
OUTPUT is a stage's folder: a trainer starts from it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path

from conversion import huggingface, torch_dist, work
from conversion.command import main
from conversion.config import ConvertConfig, ConvertPaths
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.data.tokenizer import Tokenizer
from training.errors import ConfigError
from training.files import hf_folder, tensor_files
from training.files.hf_folder import shown
from training.files.special_tokens import SpecialTokens
from training.metrics.metrics import Metrics


def convert(config: ConvertConfig) -> None:
    """Write iteration 0 of the stage. Raises ConfigError before anything is written."""
    shape = Shape.read(config.paths.model)
    shape.check_layout(config.tensor_parallel, config.pipeline_parallel)
    head, tensors = huggingface.read(config.paths.model, shape)
    check_tokenizer(Path(config.paths.model), shape.vocab)
    size = sum(tensor.nbytes for tensor in tensors.values())
    stage = StageFolder(config.paths.output)
    aside = stage.temporary(0, "converting")
    files = torch_dist.plan(tensors, shape, head)
    sizes = {name: sum(part.tensor.nbytes for part in parts) for name, parts in files.items()}
    made_from = {"from": work.described(tensor_files.find(config.paths.model).files), "files": sizes}
    with work.folder(aside, made_from, size):
        (aside / "model").mkdir(exist_ok=True)
        writers = {name: partial(torch_dist.write, parts) for name, parts in files.items()}
        written = work.write_files(aside / "model", writers, sizes, "convert")
        torch_dist.finish(aside / "model", {name: file.record for name, file in written.items()}, tensors, shape, head)
        work.clean(aside / "model")
        stage.publish(aside, 0, {f"model/{name}": file.sha256 for name, file in written.items()})
    metrics = Metrics(config.paths.output, total=len(tensors))
    metrics.log(len(tensors), ("gigabytes",), gigabytes=size / 1e9)
    metrics.close()


def check_tokenizer(folder: Path, rows: int) -> None:
    """Raises ConfigError for a tokenizer with ids beyond the embedding: under TP they would
    silently read no row at all."""
    SpecialTokens.read(folder, rows)
    token, number = Tokenizer(folder).highest() if hf_folder.file(folder, "tokenizer.json") else ("", -1)
    if number >= rows:
        raise ConfigError(
            f"{folder}: token {shown(repr(token))} of the tokenizer has id {number}, the embedding only {rows} rows; "
            "resize the embedding (model.resize_token_embeddings) or use the tokenizer that the model was trained with"
        )


def arguments() -> ArgumentParser:
    parser = ArgumentParser(
        "python -m conversion.hf_to_megatron",
        description="Hugging Face folder -> Megatron checkpoint "
        "(torch_dist; any TP x PP x DP loads it). Interrupted? Run the same again.",
    )
    parser.add_argument(
        "model", help="Hugging Face folder (config.json, *.safetensors or *.bin), or a stage's config.json alone"
    )
    parser.add_argument(
        "output", help="stage folder to write; the checkpoint goes to OUTPUT/checkpoints/iter_0000000/model"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="check that this TP fits the model (default 1)")
    parser.add_argument(
        "--pipeline-parallel", type=int, default=1, help="check that this PP fits the model (default 1)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(
        main(
            ConvertConfig,
            convert,
            arguments(),
            lambda arguments: ConvertConfig(
                paths=ConvertPaths(arguments.output, arguments.model),
                tensor_parallel=arguments.tensor_parallel,
                pipeline_parallel=arguments.pipeline_parallel,
            ),
        )
    )
