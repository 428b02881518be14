"""What the conversion tests share: folders, converted and exported."""

from __future__ import annotations

import json
import queue
from pathlib import Path

import tokenizers
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from conversion import huggingface
from conversion.config import ConvertConfig, ConvertPaths, ExportConfig, ExportPaths
from conversion.hf_to_megatron import convert
from conversion.megatron_to_hf import export
from conversion.weights import entries, stored_name
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.config.trainers import Paths, SFTConfig
from training.trainer.step import build_model

REWARD_BIAS = 2.25
VALUE_BIAS = -1.25


def convert_to(folder: Path, **layout) -> None:
    """folder/hf -> folder/convert."""
    convert(ConvertConfig(paths=ConvertPaths(str(folder / "convert"), str(folder / "hf")), **layout))


def export_from(folder: Path, name: str = "sft", stage: str = "convert", **values) -> Path:
    """folder/``stage`` -> folder/export/``name``."""
    export(
        ExportConfig(
            paths=ExportPaths(str(folder / "export"), str(folder / "hf"), {name: str(folder / stage)}), **values
        )
    )
    return folder / "export" / name


def write_tokenizer(folder: Path) -> None:
    """Five words."""
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}, unk_token="<unk>")
    )
    words.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>", "pad_token": "<pad>"}')


def trainer(tensor: int = 1, pipeline: int = 1, **values) -> SFTConfig:
    return SFTConfig(
        paths=Paths("", "", "", "", ""),
        precision="fp32",
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        micro_batch_size=2,
        global_batch_size=2,
        **values,
    )


def sparse_bloom(folder: Path, vocab: int) -> None:
    """A BLOOM of one layer, all zeros in a file with holes: it may say to be larger than the
    disk."""
    folder.mkdir()
    config = {
        "model_type": "bloom",
        "n_layer": 1,
        "hidden_size": 64,
        "n_head": 2,
        "vocab_size": vocab,
        "layer_norm_epsilon": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape = Shape.read(folder)
    sizes = {stored_name(shape, entry.name): entry.weight.size for entry in entries(shape)}
    with open(folder / "model.safetensors", "wb") as file:
        file.write(huggingface.header(sizes, torch.bfloat16))
        file.truncate(file.tell() + 2 * sum(torch.Size(size).numel() for size in sizes.values()))


def save_model(
    folder: Path, stage: str, head: str, bias: float, tensor: int, pipeline: int, name: str = "model"
) -> None:
    """Load folder/convert into the model that trains, set a scalar head's bias, and save it as
    iteration 1, a reward model's with REWARD_BIAS, PPO's with VALUE_BIAS. Inside ``ranks``."""
    model = build_model(Shape.read(folder / "hf"), trainer(tensor, pipeline), head)
    format.load_weights(
        StageFolder(folder / "convert").resolve() / "model", model, fresh_head=5 if head == "scalar" else None
    )
    if head == "scalar" and model.post_process:
        with torch.no_grad():
            if model.score.linear.bias is not None:
                model.score.linear.bias.fill_(bias)
    aside = folder / stage / "aside"
    if torch.distributed.get_rank() == 0:
        (aside / name).mkdir(parents=True)
        (aside / "state.json").write_text(
            json.dumps({"reward": {"reward_bias": REWARD_BIAS}, "rlhf": {"value_bias": VALUE_BIAS}}.get(stage, {}))
        )
    torch.distributed.barrier()
    # else a spawned manager, which outlives a rank that leaves by os._exit
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(aside / name))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (folder / stage / "checkpoints").mkdir()
        StageFolder(folder / stage).publish(aside, 1)
    torch.distributed.barrier()
