"""Mistakes that are found before anything is queued, each with its fix."""

import json
from pathlib import Path

import pytest

from launcher import checks, cluster
from launcher.config import layered
from launcher.pipeline import FULL, full_tables, select
from training.config import ConfigError


def check(*sets, profile="local", recipe="bloom-tiny", last=None):
    run = Path("runs/x")
    checks.check(run, full_tables(run, layered(recipe, [], list(sets))), select(FULL, None, last), cluster.load(profile))


def checkpoint(folder: Path, **changes) -> str:
    """A Hugging Face folder with BLOOM-560m's shape, under the names of its published config.json, and no real weights."""
    published = {"model_type": "bloom", "n_embed": 1024, "num_attention_heads": 16, "n_layer": 24, "vocab_size": 250880,
                 "layer_norm_epsilon": 1e-5}
    (folder / "config.json").write_text(json.dumps(published | changes))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return f"model.checkpoint={folder}"


def test_demo_passes():
    check()


@pytest.mark.parametrize("sets, message", [
    (["sft.tensor_parallel=4", "resources.sft.gpus_per_node=8"], "the model's 6 heads can't be divided"),
    (["rlhf.pipeline_parallel=8", "resources.rlhf.gpus_per_node=8"],
     r"4 layers can.t be divided by it; set --set rlhf.pipeline_parallel=4"),
    (["convert.tensor_parallel=5"], "convert.tensor_parallel = 5"),
    (["resources.sft.gpus_per_node=3"], "3 ranks can't be divided into tensor_parallel 1 x pipeline_parallel 2"),
    (["sft.global_batch_size=48", "sft.micro_batch_size=16", "resources.sft.gpus_per_node=4"],
     "is not a multiple of micro_batch_size 16 x 2 data-parallel ranks"),
    (["resources.sft.nodes=2"], "resources.sft.nodes = 2: profile local gives at most 1"),
    (["data.source=absent.jsonl"], "data.source = 'absent.jsonl': no such file"),
    (["model.checkpoint=absent"], "absent/config.json does not exist"),
    (["reward.load_iteration=70"], "reward.load_iteration = 70 is not saved: reward saves every 50"),
    (["reward.iterations=150", "reward.save_every=10", "reward.load_iteration=100"], "set --set reward.keep_checkpoints=6"),
])
def test_mistake_is_found_and_its_fix_named(sets, message):
    with pytest.raises(ConfigError, match=message):
        check(*sets)


@pytest.mark.parametrize("key, value, limit", [("gpus_per_node", 16, 8), ("nodes", 17, 16), ("minutes", 2000, 1440)])
def test_request_beyond_the_site_is_refused(key, value, limit):
    with pytest.raises(ConfigError, match=rf"resources.sft.{key} = {value}: profile a100 gives at most {limit}"):
        check(f"resources.sft.{key}={value}", profile="a100", last="sft")


def test_shape_comes_from_the_checkpoint(tmp_path):
    check(checkpoint(tmp_path), "sft.tensor_parallel=16", "sft.pipeline_parallel=1", "resources.sft.gpus_per_node=8",
          "resources.sft.nodes=2", profile="a100", last="sft")
    with pytest.raises(ConfigError, match="the model's 16 heads"):
        check(checkpoint(tmp_path), "convert.tensor_parallel=3", last="convert")


def test_checkpoint_must_be_a_whole_bloom(tmp_path):
    with pytest.raises(ConfigError, match="model_type = 'llama'"):
        check(checkpoint(tmp_path, model_type="llama"))
    setting = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*.safetensors"):
        check(setting)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer.json does not exist"):
        check(setting)


def test_profile_of_no_file_and_of_an_unknown_network(tmp_path):
    with pytest.raises(ConfigError, match="there are: a100, dev, h800, local"):
        cluster.load("a10")
    mine = tmp_path / "mine.toml"
    mine.write_text('scheduler = "slurm"\nnetwork = "h800"\n')
    with pytest.raises(ConfigError, match="network = 'h800': expected one of"):
        cluster.load(str(mine))
    mine.write_text('scheduler = "slurm"\npartitoin = "x"\n')
    with pytest.raises(ConfigError, match="did you mean profile mine.partition"):
        cluster.load(str(mine))
