"""What the last stages need is looked for before the first begins; hours of work beside the limits
of jobs."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from launcher import plan
from launcher.checks import judge as judging
from launcher.checks.disk import parse_mmlsquota, parse_quota
from launcher.config.sections import Profile, Resources, layered
from launcher.config.stages import PIPELINES, full_tables, stage_config
from launcher.estimates import hours, memory
from launcher.slurm import sites
from launcher.submit import create
from training.config.shape import Shape
from training.errors import ConfigError

MODELS = json.loads((Path(__file__).parents[2] / "model_configs.json").read_text())
LOCAL = Profile(name="local", scheduler="local")


def config_of(stage: str, *sets: str, recipe: str = "bloom-7b1", profile: str = "a100", pipeline: str = "ppo"):
    tables = full_tables(Path("runs/x"), layered(recipe, [], list(sets), sites.load(profile)), PIPELINES[pipeline])
    return stage_config(Path("runs/x"), tables, PIPELINES[pipeline], stage), Resources(**tables["resources"][stage])


def shape_of(name: str, folder: Path) -> Shape:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 250880, "layer_norm_epsilon": 1e-5, **MODELS[name]}))
    return Shape.read(folder)


def judge(**changes):
    config, _ = config_of("mtbench")
    return judging.check_judge(dataclasses.replace(config, **changes), LOCAL)


def test_the_judge_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    cloud = {"judge": "openai", "judge_url": "https://api.openai.com/v1"}
    with pytest.raises(ConfigError, match="judge_model = 'nowhere': nowhere/config.json does not exist"):
        judge(judge="local", judge_model="nowhere")
    with pytest.raises(ConfigError, match="without a key: the variable OPENAI_API_KEY"):
        judge(**cloud)
    with pytest.raises(ConfigError, match="judge_key_file = 'no.key': No such file"):
        judge(**cloud, judge_key_file="no.key")
    (tmp_path / "key").write_text("sk-1")
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(ConfigError, match=r"others may use it \(mode 644, 044 too much\): chmod 600"):
        judge(**cloud, judge_key_file=str(tmp_path / "key"))
    os.chmod(tmp_path / "key", 0o600)
    assert (
        judge(**cloud, judge_key_file=str(tmp_path / "key"))
        == ""
        == judge(judge="openai", judge_url="http://localhost:8000/v1")
    )
    assert "asked without a key" in judge(judge="openai", judge_url="http://n1:8000/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert judge(**cloud) == ""


def test_a_model_that_one_gpu_does_not_hold_is_not_evaluated_after_all_training(tmp_path):
    config, _ = config_of("mtbench")
    with pytest.raises(ConfigError, match=r"a model's weights in fp32 705 GB.*--until export"):
        memory.check_evaluation(shape_of("bloom-176b", tmp_path / "big"), config, sites.load("a100"))
    assert memory.check_evaluation(shape_of("bloom-7b1", tmp_path / "small"), config, sites.load("a100")) == ""


@pytest.mark.parametrize(
    "stage, pipeline", [("sft", "ppo"), ("reward", "ppo"), ("rlhf", "ppo"), ("grpo", "grpo"), ("dpo", "dpo")]
)
def test_hours_of_work_grow_with_the_iterations_and_say_the_requeues(stage, pipeline, tmp_path):
    shape, site = shape_of("bloom-7b1", tmp_path), sites.load("a100")
    config, asked = config_of(stage, pipeline=pipeline)
    asked = dataclasses.replace(asked, minutes=60)
    one = hours.work(stage, shape, dataclasses.replace(config, iterations=10_000, warmup_iterations=0), asked, site)
    two = hours.work(stage, shape, dataclasses.replace(config, iterations=20_000, warmup_iterations=0), asked, site)
    assert two.hours == pytest.approx(2 * one.hours) and one.gpu_hours == pytest.approx(8 * one.hours)
    assert one.requeues < one.hours <= one.requeues + 1, "each job gives one hour"
    assert hours.work(stage, shape, config, asked, LOCAL) is None, "nothing is known of that machine"


def test_the_plan_is_shown_without_weights_and_with_too_small_a_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape_of("bloom-7b1", tmp_path / "model")
    request = create.SubmitRequest(
        "full-pipeline",
        "bloom-7b1",
        Path("runs"),
        sites.load("a100"),
        "as asked",
        name="x",
        sets=("model.checkpoint=model", "rlhf.iterations=5000", "rlhf.keep_every=50"),
    )
    tolerant_plan = create.plan(dataclasses.replace(request, tolerant=True))
    out = Console(width=220, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - nothing is written
    monkeypatch.setattr(plan.test_only, "expected_starts", lambda _: {})
    with pytest.raises(ConfigError) as caught:
        plan.present(tolerant_plan, out)
    shown = out.export_text()
    assert "work, h" in shown and "memory of a GPU" in shown and "waits in the queue again" in shown
    assert all(
        words in str(caught.value)
        for words in ("model/tokenizer.json does not exist", "no such file", "the run would write")
    )
    with pytest.raises(ConfigError, match="tokenizer.json does not exist"):
        create.plan(dataclasses.replace(request, sets=("model.checkpoint=model",)))


def test_quotas_of_groups_projects_and_gpfs_are_read():
    lustre = "     /scratch 1500000*  1400000 1600000       - 5 0 0 -\n"
    assert parse_quota(lustre) == pytest.approx(-0.1024)
    gpfs = (
        "mmlsquota::HEADER:version:reserved:reserved:filesystemName:quotaType:id:name:blockUsage:blockQuota:blockLimit:blockInDoubt:"
        "blockGrace:filesUsage:\nmmlsquota::0:1:::gpfs0:USR:1000:u:1000000:2000000:3000000:0:none:5:\n"
        "mmlsquota::0:1:::gpfs0:GRP:100:g:0:0:0:0:none:5:\nmmlsquota::0:1:::gpfs0:FILESET:3:proj:500000:0:1000000:0:none:5:\n"
    )
    assert parse_mmlsquota(gpfs) == pytest.approx(0.512)
    assert parse_mmlsquota("") is None
