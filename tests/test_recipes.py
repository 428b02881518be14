"""Every recipe, in each of its layouts: it divides, fits the GPUs' memory, and builds the model
that Hugging Face builds.

tests/model_configs.json: the published config.json of each size (bigscience/bloom*,
HuggingFaceTB/SmolLM2-135M-Instruct, meta-llama/Llama-3.1-8B, Qwen/Qwen3-8B, ...), as far as the
shape goes, and the number of parameters on its model card.
"""

import json
import math
import multiprocessing
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.config.sections import RECIPES, build_plain, layered, read_recipe, read_toml
from launcher.config.stages import PIPELINES, full_tables, stage_config
from launcher.estimates import memory
from launcher.slurm import sites
from training.config.shape import Shape
from training.distributed import cpu_backend
from training.trainer.step import build_model

PUBLISHED = json.loads((Path(__file__).parent / "model_configs.json").read_text())
TRAINERS = ("sft", "reward", "rlhf", "dpo", "grpo")


def shape_of(name: str, folder: Path) -> Shape:
    config = {"vocab_size": 250880, "layer_norm_epsilon": 1e-5, **PUBLISHED[name]}
    (folder / "config.json").write_text(json.dumps(config))
    return Shape.read(folder)


def cases() -> list[tuple[str, str]]:
    """(recipe, profile): both kinds of 8 x 80 GB for each recipe, and each further layout that it
    has."""
    return [
        (name, profile)
        for name in PUBLISHED
        for profile in ("a100", "h800", *read_toml(RECIPES / f"{name}.toml").get("layouts", {}))
    ]


def test_there_is_a_recipe_for_each_size():
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*PUBLISHED, "bloom-tiny"}
    assert [name for name, profile in cases() if profile == "h200"] == [
        name for name in PUBLISHED if name != "bloom-176b"
    ]


@pytest.mark.parametrize(("name", "profile"), cases())
def test_layout_divides_and_fits(name, profile, tmp_path):
    """Heads and layers by TP and PP, the batch by DP, whole nodes by TP; memory by
    launcher/estimates/memory.py's formula."""
    site, shape = sites.load(profile), shape_of(name, tmp_path)
    tables = layered(name, [], [], site)
    resources = build_plain("resources", tables["resources"])
    for stage in TRAINERS:
        graph = next(each for each in PIPELINES.values() if stage in each)
        config, asked = (
            stage_config(tmp_path, full_tables(tmp_path, tables, graph), graph, stage),
            getattr(resources, stage),
        )
        shape.check_layout(config.tensor_parallel, config.pipeline_parallel, config.virtual_pipeline)
        shape.check_length(config.LENGTH, config.longest_row)
        data = config.data_parallel(asked.ranks)
        assert asked.gpus_per_node == site.gpus_per_node and asked.gpus_per_node % config.tensor_parallel == 0
        assert config.global_batch_size % (data * config.micro_batch_size) == 0
        if stage in ("rlhf", "grpo"):
            assert config.rollout_batch_size % data == 0
        made = memory.estimate(shape, config, asked.ranks)
        assert made.total < 0.95 * site.gpu_memory_gb, (stage, made.total)
    if name != "bloom-176b":
        assert max(getattr(resources, stage).nodes for stage in TRAINERS) == 1
    assert all(tables["convert"].get(key) == tables["sft"].get(key) for key in ("tensor_parallel", "pipeline_parallel"))


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("bloom")])
def test_hyper_parameters_are_the_tutorial_s_on_every_site(name):
    """What is learnt must not depend on the site: layouts only say how it is divided."""
    alone = {
        "tensor_parallel",
        "pipeline_parallel",
        "virtual_pipeline",
        "sequence_parallel",
        "micro_batch_size",
        "micro_batch_tokens",
        "recompute",
        "optimizer_precision",
        "generation_batch_size",
        "async_save",
        "offload",
    }
    for layout in read_toml(RECIPES / f"{name}.toml").get("layouts", {}).values():
        assert set(layout) <= {"gpus_per_node", "gpu_memory_gb", "convert", "resources", *TRAINERS}
        assert all(set(layout[stage]) <= alone for stage in TRAINERS if stage in layout)
    sft, reward, rlhf, dpo, grpo = (read_recipe(name)[stage] for stage in TRAINERS)
    assert (grpo["lr"], grpo["kl_coef"], grpo["rollout_batch_size"], grpo["global_batch_size"]) == (
        1e-6,
        0.04,
        1024,
        1024,
    )
    assert (dpo["lr"], dpo["beta"], dpo["global_batch_size"]) == (5e-7, 0.1, 64)
    assert (sft["lr"], sft["warmup_iterations"], sft["iterations"], sft["seq_length"]) == (2e-5, 40, 1000, 2048)
    assert (reward["lr"], reward["warmup_iterations"], reward["iterations"], reward["weight_decay"]) == (
        1e-5,
        300,
        3600,
        0.1,
    )
    assert (rlhf["lr"], rlhf["value_lr"], rlhf["warmup_iterations"], rlhf["iterations"]) == (2.4e-7, 5e-6, 100, 5000)
    assert (rlhf["prompt_length"], rlhf["response_length"], rlhf["rollout_batch_size"], rlhf["global_batch_size"]) == (
        1024,
        512,
        1024,
        128,
    )
    assert sft["global_batch_size"] == reward["global_batch_size"] and sft["global_batch_size"] % 64 == 0


def test_a_layout_is_chosen_by_the_profile_s_nodes(tmp_path):
    """By what a node has, not by the profile's name: one of your own finds it, too; with less
    memory it does not."""
    text = 'scheduler = "local"\nnetwork = "one-machine"\ngpus_per_node = 1\ngpu_memory_gb = {}\n'
    for gigabytes, tensor in ((143.0, 1), (80.0, 4)):
        (tmp_path / "mine.toml").write_text(text.format(gigabytes))
        assert layered("bloom-7b1", [], [], sites.load(str(tmp_path / "mine.toml")))["sft"]["tensor_parallel"] == tensor
    made = layered("bloom-7b1", [], ["sft.recompute=none"], sites.load("h200"))
    assert made["sft"]["recompute"] == "none" and made["resources"]["sft"]["minutes"] == 720, (
        "--set wins; the rest is the recipe's"
    )


def _shapes(connection, rank: int, world: int, shape: Shape, config) -> None:
    """Build ``rank``'s part on the meta device under a group of ``world`` ranks that never talk ->
    {key: whole tensor's shape}."""
    try:
        cpu_backend.CPU = torch.device("meta")  # megatron-core's devices are this module's answer
        with cpu_backend.mcore_on_cpu():
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
            parallel_state.initialize_model_parallel(
                config.tensor_parallel, config.pipeline_parallel, create_gloo_process_groups=False
            )
            tensor_parallel.model_parallel_cuda_manual_seed(1)
            model = build_model(shape, config, "lm")
            assert all(parameter.is_meta for parameter in model.parameters())
            own = sum(parameter.numel() for parameter in model.parameters())
            connection.send(
                ({tensor.key: tuple(tensor.global_shape) for tensor in model.sharded_state_dict().values()}, own)
            )
    except BaseException:  # noqa: BLE001 - the parent shows it
        connection.send(traceback.format_exc())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_is_hugging_face_s(name, tmp_path):
    """First, second and last pipeline stage of the SFT layout, on the meta device: names and shapes
    add up to Hugging Face's parameters, the memory formula's count is the real one, and the
    vocabulary is only padded."""
    shape = shape_of(name, tmp_path)
    with torch.device("meta"):
        theirs = sum(
            parameter.numel()
            for parameter in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).parameters()
        )
    assert theirs == PUBLISHED[name]["parameters"] == shape.parameters()
    graph = PIPELINES["ppo"]
    tables = full_tables(tmp_path, layered(name, [], [], sites.load("a100")), graph)
    config, asked = stage_config(tmp_path, tables, graph, "sft"), build_plain("resources", tables["resources"]).sft
    whole: dict[str, tuple[int, ...]] = {}
    context = multiprocessing.get_context("fork")
    stages = sorted({0, min(1, config.pipeline_parallel - 1), config.pipeline_parallel - 1})
    for stage in stages:
        ours, child = context.Pipe()
        rank = stage * (asked.ranks // config.pipeline_parallel)
        process = context.Process(target=_shapes, args=(child, rank, asked.ranks, shape, config))
        process.start()
        found = ours.recv()
        process.join()
        assert not isinstance(found, str), found
        tensors, own = found
        whole |= tensors
        data = config.data_parallel(asked.ranks)
        assert own == memory.Rank(shape, config, data, stage).parameters("lm")
    padded = shape.padded_vocab(config.tensor_parallel)
    assert whole["embedding.word_embeddings.weight"] == (padded, shape.hidden)
    padding = (padded - shape.vocab) * shape.hidden * (1 if shape.tied else 2)
    assert sum(math.prod(size) for size in whole.values()) - padding == theirs
    assert {size[0] for key, size in whole.items() if key.startswith("decoder.layers.")} == {shape.layers}
