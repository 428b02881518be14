"""Mistakes that are found before anything is queued, each with its fix."""

import contextlib
import dataclasses
import gzip
import itertools
import json
import math
import os
import shutil
import struct
import tracemalloc
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from launcher.checks import disk, plan_checks
from launcher.config.sections import layered
from launcher.config.stages import FULL, PIPELINES, full_tables, select, stage_config
from launcher.slurm import sites
from launcher.submit import sweep
from tests.support.bloom import tiny_bloom
from tests.support.llama import tiny_llama
from training.config.shape import Shape
from training.errors import ConfigError
from training.models.bloom import table

GOOD_ROW = b'{"query": "q", "response": ["a", "b"], "score": [1, 0]}\n'


def check(*sets, profile="local", recipe="bloom-tiny", last=None):
    run = Path("runs/x")
    graph = PIPELINES["ppo"]
    tables = full_tables(run, layered(recipe, [], list(sets)), graph)
    plan_checks.check(run, tables, graph, select(graph, FULL, None, last), sites.load(profile))


def safetensors(path: Path, tensors: dict[str, list[int]]) -> None:
    """A whole file of bf16 tensors, its data a hole in the file."""
    offset, header = 0, {}
    for name, shape in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, offset := offset + 2 * math.prod(shape)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + offset)


def llama(folder: Path, **changes) -> str:
    """SmolLM2-135M's shape."""
    checkpoint(folder)
    published = json.loads((Path(__file__).parents[2] / "model_configs.json").read_text())["smollm2-135m"]
    safetensors(folder / "model.safetensors", tensors_of(folder, published, "model."))
    (folder / "config.json").write_text(json.dumps(published | changes))
    return f"model.checkpoint={folder}"


def test_a_llama_passes_and_its_heads_layers_and_positions_are_checked(tmp_path):
    setting = llama(tmp_path)
    check(setting)
    with pytest.raises(
        ConfigError, match=r"tensor_parallel = 9 does not divide the model's 3 key-value heads; choose one of 1, 3"
    ):
        check(setting, "sft.tensor_parallel=9", "resources.sft.gpus_per_node=9", profile="dev")
    with pytest.raises(
        ConfigError, match=r"sft.seq_length = 9000 is more than the model's max_position_embeddings = 8192"
    ):
        check(setting, "sft.seq_length=9000")
    with pytest.raises(ConfigError, match=r"rlhf.prompt_length \+ response_length = 8193 is more"):
        check(setting, "rlhf.prompt_length=8169")
    with pytest.raises(ConfigError, match="mtbench.context_length = 8193 is more"):
        check(setting, "mtbench.context_length=8193")
    with pytest.raises(ConfigError, match=r"says 31 layers; the weights lack layers 30"):
        check(llama(tmp_path, num_hidden_layers=31))


def tensors_of(folder: Path, config: dict, prefix: str = "") -> dict[str, list[int]]:
    """Names and shapes of the tensors of ``config``'s model."""
    (folder / "config.json").write_text(json.dumps(config))
    return {
        prefix + name: list(size) for _, _, parts in Shape.read(folder).weights("tied") for name, size in parts.items()
    }


def checkpoint(folder: Path, shards: int = 1, **changes) -> str:
    """A Hugging Face folder with BLOOM-560m's shape, under the names of its published config.json
    and weights."""
    published = {
        "model_type": "bloom",
        "n_embed": 1024,
        "num_attention_heads": 16,
        "n_layer": 24,
        "vocab_size": 250880,
        "layer_norm_epsilon": 1e-5,
    }
    tensors = tensors_of(folder, published)
    (folder / "config.json").write_text(json.dumps(published | changes))
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4}
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    if shards == 1:
        safetensors(folder / "model.safetensors", tensors)
    else:
        names = list(tensors)
        parts = {f"model-{at + 1:05d}-of-{shards:05d}.safetensors": names[at::shards] for at in range(shards)}
        for name, held in parts.items():
            safetensors(folder / name, {tensor: tensors[tensor] for tensor in held})
        weight_map = {tensor: name for name, held in parts.items() for tensor in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return f"model.checkpoint={folder}"


def test_demo_passes():
    check()


@pytest.mark.parametrize(
    "sets, message",
    [
        (
            ["sft.tensor_parallel=4", "resources.sft.gpus_per_node=8"],
            "sft.tensor_parallel = 4 does not divide the model's 6 attention heads; choose one of 1, 2, 3, 6; with "
            "--set sft.KEY=VALUE",
        ),
        (
            ["rlhf.pipeline_parallel=8", "resources.rlhf.gpus_per_node=8"],
            r"rlhf.pipeline_parallel = 8 is more than the model's 4 layers; choose any from 1 to 4",
        ),
        (["convert.tensor_parallel=5"], "convert.tensor_parallel = 5"),
        (
            [
                "rlhf.tensor_parallel=2",
                "rlhf.pipeline_parallel=2",
                "rlhf.generation_tensor_parallel=4",
                "resources.rlhf.gpus_per_node=4",
            ],
            "rlhf.generation_tensor_parallel = 4 does not divide the model's 6 attention heads; choose one of 1, 2, "
            "3, 6; with --set rlhf.KEY",
        ),
        (["resources.sft.gpus_per_node=3"], "3 ranks can't be divided into tensor_parallel 1 x pipeline_parallel 2"),
        (
            ["sft.global_batch_size=48", "sft.micro_batch_size=16", "resources.sft.gpus_per_node=4"],
            "is not a multiple of micro_batch_size 16 x 2 data-parallel ranks",
        ),
        (["resources.sft.nodes=2"], "resources.sft.nodes = 2: profile local gives at most 1"),
        (["data.source=absent.jsonl"], "data.source = 'absent.jsonl': no such file"),
        (["mtbench.questions=absent.whl"], 'mtbench.questions = "absent.whl": no such file or folder'),
        (["mtbench.references=absent.jsonl"], "mtbench.references = 'absent.jsonl': no such file"),
        (["mtbench.template=chat"], 'mtbench.template = "chat", but runs/x/model: its tokenizer has no chat template'),
        (["model.checkpoint=absent"], "absent/config.json does not exist"),
        (["reward.load_iteration=70"], "reward.load_iteration = 70 is not saved: reward saves every 50"),
        (
            ["reward.iterations=150", "reward.save_every=10", "reward.load_iteration=100"],
            "set --set reward.keep_checkpoints=6",
        ),
    ],
)
def test_mistake_is_found_and_its_fix_named(sets, message):
    with pytest.raises(ConfigError, match=message):
        check(*sets)


@pytest.mark.parametrize("key, value, limit", [("gpus_per_node", 16, 8), ("nodes", 17, 16), ("minutes", 2000, 1440)])
def test_request_beyond_the_site_is_refused(key, value, limit):
    with pytest.raises(ConfigError, match=rf"resources.sft.{key} = {value}: profile a100 gives at most {limit}"):
        check(f"resources.sft.{key}={value}", profile="a100", last="sft")


def test_shape_comes_from_the_checkpoint(tmp_path):
    check(
        checkpoint(tmp_path),
        "sft.tensor_parallel=16",
        "sft.pipeline_parallel=1",
        "resources.sft.gpus_per_node=8",
        "resources.sft.nodes=2",
        profile="a100",
        last="sft",
    )
    with pytest.raises(ConfigError, match="the model's 16 attention heads"):
        check(checkpoint(tmp_path), "convert.tensor_parallel=3", last="convert")


def test_every_mistake_is_named_at_once():
    with pytest.raises(ConfigError) as refused:
        check(
            "sft.tensor_parallel=4",
            "resources.sft.gpus_per_node=8",
            "data.source=absent.jsonl",
            "reward.load_iteration=70",
        )
    said = str(refused.value)
    assert said.startswith("3 mistakes:\n1. data.source = 'absent.jsonl'")
    assert "\n2. reward.load_iteration" in said and "6 attention heads" in said


def test_a_folder_of_no_known_family(tmp_path):
    with pytest.raises(ConfigError, match="model_type = 'gpt2'; expected one of bloom, llama"):
        check(checkpoint(tmp_path, model_type="gpt2"))
    setting = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no weights in .*expected model.safetensors, or pytorch_model.bin"):
        check(setting)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer.json does not exist"):
        check(setting)


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def no_header(folder: Path) -> None:
    os.truncate(folder / "model-00001-of-00003.safetensors", 5)


def lost_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def lost_tensor(folder: Path) -> None:
    safetensors(folder / "model-00003-of-00003.safetensors", {"h.1.input_layernorm.weight": [1024]})


def pointer(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def short_index(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if ".h.7." not in f".{name}"}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut, r"model-00002-of-00003.safetensors is truncated or damaged: [\d,]+ bytes, its header says [\d,]+"),
        (no_header, r"is truncated or no safetensors file: 5 bytes"),
        (lost_shard, r"model-00003-of-00003.safetensors is missing, .*names it \(shard 3 of 3\)"),
        (lost_tensor, r"says that model-00003-of-00003.safetensors holds \S+, it does not"),
        (pointer, "is a git-LFS pointer"),
        (short_index, "says 24 layers; the weights lack layers 7"),
    ],
)
def test_damaged_weights_are_found_without_reading_them(damage, message, tmp_path):
    setting = checkpoint(tmp_path, shards=3)
    check(setting, last="convert")
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check(setting, last="convert")


def test_weights_of_another_shape(tmp_path):
    with pytest.raises(
        ConfigError, match=r"word_embeddings.weight is \[250880, 1024\], config.json says \[250881, 1024\]"
    ):
        check(checkpoint(tmp_path, vocab_size=250881), last="convert")


def saved(folder: Path, model=tiny_llama, **values) -> Path:
    """What transformers saves of a tiny model, with a tokenizer's files."""
    checkpoint(folder)
    (folder / "model.safetensors").unlink()
    model(folder, layers=2, **values)
    return folder


def changed(folder: Path, change) -> str:
    """The tensors of ``folder`` after ``change`` (a function of their dictionary); as a setting."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return f"model.checkpoint={folder}"


SHORT = "mtbench.context_length=256"
QUERY, EMBEDDED, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"


def test_what_transformers_saves_passes_whole_or_in_shards(tmp_path):
    """Also with an output matrix that repeats the embedding, a classifier's head, and the buffers
    of Llama 2's first checkpoints."""
    for number, model in enumerate(
        (tiny_llama, partial(tiny_llama, tied=False), tiny_bloom, partial(tiny_bloom, tied=False))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(f"model.checkpoint={saved(folder, model)}", SHORT)
    tied = saved(tmp_path / "0")
    buffer = QUERY.replace("q_proj.weight", "rotary_emb.inv_freq")
    check(changed(tied, lambda tensors: tensors.update({HEAD: tensors[EMBEDDED], buffer: torch.ones(4)})), SHORT)
    check(
        changed(tied, lambda tensors: (tensors.pop(HEAD), tensors.update({"score.weight": torch.ones(1, 64)}))), SHORT
    )
    check(changed(tmp_path / "2", lambda tensors: tensors.update({"score.weight": torch.ones(1, 64)})), SHORT)
    LlamaForCausalLM.from_pretrained(tmp_path / "1").save_pretrained(sharded := tmp_path / "4", max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "1" / name, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    check(f"model.checkpoint={sharded}", SHORT)
    index = sharded / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shutil.copy(sharded / places["model.norm.weight"], sharded / "stale.safetensors")
    index.write_text(json.dumps({"weight_map": places | {"model.norm.weight": "stale.safetensors"}}))
    with pytest.raises(ConfigError, match="stale.safetensors holds .*; remove the stale shard"):
        check(f"model.checkpoint={sharded}", SHORT)


@pytest.mark.parametrize(
    "values, change, message",
    [
        (
            {"intermediate_size": 100},
            None,
            r"mlp.gate_proj.weight is \[88, 64\], config.json says \[100, 64\] .*feed-forward width 100",
        ),
        (
            {"num_key_value_heads": 4},
            None,
            r"self_attn.k_proj.weight is \[16, 64\], config.json says \[32, 64\] .*4 key-value heads",
        ),
        ({"vocab_size": 299}, None, r"model.embed_tokens.weight is \[300, 64\], config.json says \[299, 64\]"),
        (
            {"num_hidden_layers": 2**31 - 1},
            None,
            r"says 2147483647 layers; the weights lack layers 2, 3, 4, 5, 6 \.\.\.",
        ),
        (
            {"tie_word_embeddings": False},
            None,
            "lack lm_head.weight, which config.json asks for; .*tie_word_embeddings = true",
        ),
        (
            {},
            lambda held: held.update({HEAD: held[EMBEDDED] + 1}),
            "lm_head.weight differs from the embedding, .*tie_word_embeddings = false",
        ),
        (
            {},
            lambda held: held.update({QUERY: held[QUERY].half()}),
            "k_proj.weight is F32, its like are F16; save the model in one type",
        ),
        (
            {},
            lambda held: held.update({QUERY: held[QUERY].to(torch.int8)}),
            "q_proj.weight has type I8; weights are BF16, F16, F32",
        ),
        ({}, lambda held: held.pop(QUERY), "lack layers.0.self_attn.q_proj.weight, which config.json asks for"),
        (
            {},
            lambda held: held.update({QUERY.replace("weight", "bias"): torch.ones(64)}),
            "hold .*q_proj.bias, no llama's",
        ),
        (
            {},
            lambda held: held.update({QUERY[6:]: held[QUERY]}),
            "layers.0.self_attn.q_proj.weight twice, with and without the prefix",
        ),
    ],
)
def test_every_tensor_is_compared_with_config_json(values, change, message, tmp_path):
    config = saved(tmp_path) / "config.json"
    setting = changed(tmp_path, change or (lambda tensors: None))
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    with pytest.raises(ConfigError, match=message):
        check(setting, SHORT)


@pytest.mark.parametrize(
    "entry", [{"shape": "ab"}, {"shape": [-1]}, {"shape": [1.0]}, {"dtype": []}, {"data_offsets": 1}, {"more": 1}, 7]
)
def test_a_header_of_nonsense(entry, tmp_path):
    setting = checkpoint(tmp_path)
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry if isinstance(entry, dict) else entry}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(
        ConfigError, match=r"the header of .*model.safetensors can't be read \(x: .*expected .*\); download it again"
    ):
        check(setting)


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"architectures": ["BloomForSequenceClassification"]},
            "expected BloomForCausalLM: a chain starts from a language model",
        ),
        ({"architectures": "BloomForCausalLM"}, "architectures = BloomForCausalLM: expected"),
        (
            {"pad_token_id": 250880},
            "config.json: pad_token_id = 250880: expected a whole number from 0, below vocab_size, 250880",
        ),
        ({"pad_token_id": -1}, "pad_token_id = -1"),
        ({"eos_token_id": [2, 250880]}, r"eos_token_id = \[2, 250880\]"),
    ],
)
def test_config_json_is_of_a_language_model_and_its_ids_have_rows(values, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        check(checkpoint(tmp_path, **values), last="convert")


def test_weights_of_torch_are_taken_where_the_archive_is_whole(tmp_path):
    setting = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"never unpickled")
    check(setting, last="convert")
    os.truncate(tmp_path / "pytorch_model.bin", 20)
    with pytest.raises(ConfigError, match="pytorch_model.bin is no whole torch archive: truncated"):
        check(setting, last="convert")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer_config.json", {"pad_token": "<pad>"}, "names no eos token"),
        (
            "tokenizer_config.json",
            {"eos_token": "</s>", "pad_token": "<end>"},
            "pad_token = '<end>' of the tokenizer's files is not in tokenizer.json",
        ),
        (
            "tokenizer_config.json",
            {"eos_token": {"content": "<end>"}, "pad_token": "<pad>"},
            "eos_token = '<end>' of the tokenizer's files is not in tokenizer.json",
        ),
        (
            "tokenizer.json",
            {"model": {"type": "BPE", "merges": [], "vocab": {"a": 0, "</s>": 250880, "<pad>": 2}}},
            "token '</s>' of .* has id 250880, the embedding has",
        ),
        ("tokenizer.json", {}, "tokenizer.json: model can't be loaded by tokenizers"),
    ],
)
def test_tokenizer_that_does_not_fit_the_model(file, content, message, tmp_path):
    setting = checkpoint(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        check(setting, last="convert")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", GOOD_ROW + b'{"query": 7}\n', r"rows.jsonl:2: query: 7: expected a string"),
        ("rows.jsonl.gz", gzip.compress(GOOD_ROW * 50, mtime=0)[:-20], "can't be read"),
        ("rows.jsonl.gz", b"version https://git-lfs.github.com/spec/v1\n", "a git-LFS pointer"),
        ("rows.jsonl", b"", "no usable row: the file is empty"),
    ],
)
def test_data_is_read_before_anything_is_queued(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check(f"data.source={tmp_path / name}")


def test_more_than_the_disk_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_space", lambda folder: disk.FreeSpace(10.0, f"free on the file system of {folder}"))
    with pytest.raises(
        ConfigError,
        match=r"the run would write about \d+\.\d GB \(at once: .*rlhf .*"
        r"but only 10.0 GB are free.*rlhf.keep_checkpoints=1",
    ):
        check(checkpoint(tmp_path), recipe="bloom-560m", profile="a100")


def test_quotas_are_read_from_both_commands():
    quota = """Disk quotas for user u (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
fs:/home/u  1000000  2000000 3000000       0      12       0       0       0
"""
    lustre = "     /scratch 1500000*  1400000 1600000       - 5 0 0 -\n"
    assert disk.parse_quota(quota) == pytest.approx(1.024)
    assert disk.parse_quota(lustre) == pytest.approx(-0.1024)
    assert disk.parse_quota("Disk quotas for user u (uid 1000): none\n") is None
    assert disk.parse_quota("  /dev/sda1  20  0  0  0  2  0  0  0\n") is None


def test_kept_checkpoints_and_the_one_being_written():
    graph = PIPELINES["ppo"]
    tables = full_tables(Path("runs/x"), layered("bloom-7b1", [], ["sft.keep_every=400"]), graph)
    sft, reward = (stage_config(Path("runs/x"), tables, graph, name) for name in ("sft", "reward"))
    assert disk.checkpoints(sft) == 4, "400, 800 for good, the last 2 (800 and 1000), one being written"
    assert disk.checkpoints(reward) == 3
    shape = table.shape(30, 4096, 32, 250880, 1e-5)
    assert disk.checkpoint_gb(sft, shape) == pytest.approx(99.0, abs=0.1)
    adapters = 30 * 16 * 16 * 4096
    assert disk.checkpoint_gb(dataclasses.replace(sft, lora_rank=16), shape) == pytest.approx(
        14.1 + 14 * adapters / 1e9, abs=0.1
    )


def test_profile_of_no_file_and_of_an_unknown_network(tmp_path):
    with pytest.raises(ConfigError, match="there are: a100, dev, h200, h800, local"):
        sites.load("a10")
    mine = tmp_path / "mine.toml"
    mine.write_text('scheduler = "slurm"\nnetwork = "h800"\n')
    with pytest.raises(ConfigError, match="network = 'h800': expected one of"):
        sites.load(str(mine))
    mine.write_text('scheduler = "slurm"\npartitoin = "x"\n')
    with pytest.raises(ConfigError, match="did you mean profile mine.partition"):
        sites.load(str(mine))


HUGE = [f"{stage}.iterations=10000000000" for stage in ("sft", "reward", "rlhf")]


def test_work_and_memory_do_not_grow_with_a_number_in_a_setting():
    """Saved iterations are counted, not listed."""
    tracemalloc.start()
    for sets in (
        HUGE,
        [*HUGE, "reward.save_every=1", "reward.load_iteration=9999999999"],
        ["sft.micro_batch_size=1000000007", "sft.global_batch_size=1000000007"],
        ["sft.seq_length=10000000000"],
        ["rlhf.response_length=10000000000"],
        ["data.heldout_max=10000000000"],
    ):
        with contextlib.suppress(ConfigError):
            check(*sets)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    for value in ("1" * 400, "-" + "1" * 400):
        with pytest.raises(ConfigError, match="sft.iterations: expected a number of at most 9,223,372,036,854,775,807"):
            check(f"sft.iterations={value}")
    with pytest.raises(ConfigError, match="--sweep: 100000000 combinations; at most 1000"):
        sweep.combinations(
            [f"sft.{key}=" + ",".join(map(str, range(1, 101))) for key in ("lr", "seed", "iterations", "patience")]
        )


def test_saves_are_counted_as_they_are_listed():
    for every, iterations, keep_every, keep in itertools.product((1, 3, 4), (1, 7, 12, 13), (0, 2, 6, 13), (1, 2, 30)):
        config = SimpleNamespace(save_every=every, iterations=iterations, keep_every=keep_every, keep_checkpoints=keep)
        saved = sorted({*range(every, iterations + 1, every), iterations})
        kept = {number for number in saved if keep_every and number % keep_every == 0} | set(saved[-keep:])
        assert disk.checkpoints(config) == min(len(saved), len(kept) + 1), config
        numbers = {number: disk.save_number(config, number) for number in range(iterations + 5)}
        assert numbers == {number: saved.index(number) + 1 if number in saved else 0 for number in numbers}
