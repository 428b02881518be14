"""Merging: defaults < recipe < file < --set, and what a mistake says."""

import dataclasses
from pathlib import Path

import pytest

from launcher.config.sections import (
    RECIPES,
    SECTIONS,
    Profile,
    Resources,
    build_plain,
    differences,
    layered,
    merge,
    parse_set,
    read_recipe,
)
from launcher.config.stages import ALL, PIPELINES, full_tables, stage_config
from training.config.trainers import SFTConfig
from training.errors import ConfigError

RUN = Path("runs/x")


def tables(*sets, recipe="bloom-tiny", files=(), pipeline="ppo"):
    return full_tables(RUN, layered(recipe, list(files), list(sets)), PIPELINES[pipeline])


def test_later_layers_win_key_by_key(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[sft]\nlr = 0.25\nmin_lr = 0.125\n")
    made = tables("sft.lr=0.5", files=[file])["sft"]
    recipe = read_recipe("bloom-tiny")["sft"]
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    assert (made["lr"], made["min_lr"]) == (0.5, 0.125)
    assert (made["iterations"], made["adam_beta1"]) == (recipe["iterations"], defaults["adam_beta1"])


def test_one_key_of_a_stage_s_resources_leaves_its_others():
    made = tables("resources.convert.minutes=7")["resources"]["convert"]
    assert made == dataclasses.asdict(Resources(gpus_per_node=0, minutes=7, cpus_per_gpu=1))


@pytest.mark.parametrize(
    "text, value",
    [
        ("sft.lr=1e-5", 1e-5),
        ("sft.lr=.9", 0.9),
        ("sft.lr=-5.e-3", -5e-3),
        ("data.source=.", "."),
        ("sft.sequence_parallel=true", True),
        ("model.checkpoint=models/bloom", "models/bloom"),
        ('data.source="a = b"', "a = b"),
        ("data.source=1\nx = 2", "1\nx = 2"),
        ("data.source=", ""),
    ],
)
def test_values_are_toml_and_bare_words_are_strings(text, value):
    section, key = text.partition("=")[0].split(".")
    assert parse_set(text) == {section: {key: value}}


@pytest.mark.parametrize("text", ["lr=1", "sft.lr", "sft.=3", "=3"])
def test_a_set_without_section_and_key_says_how(text):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_set(text)


@pytest.mark.parametrize("section", sorted(set(SECTIONS) - {"resources"}))
def test_unknown_key_in_every_section_names_the_nearest(section):
    key = next(field.name for field in dataclasses.fields(SECTIONS[section]) if field.name != "paths")
    with pytest.raises(ConfigError, match=rf"{section}\.{key}x: no such key; did you mean {section}\.{key}"):
        tables(f"{section}.{key}x=1")


@pytest.mark.parametrize(
    "setting, message",
    [
        ("stf.lr=1", "no section 'stf'; did you mean 'sft.lr'"),
        (
            "resources.sft.options.nodes=2",
            r"resources\.sft\.options\.nodes: the launcher sets it; use resources\.<stage>\.nodes",
        ),
        (
            "resources.sft.options.mem=2",
            r"resources\.sft\.options\.mem: the launcher sets it; use mem_gb of the profile",
        ),
        ("resources.sft.options.uid=0", r"resources\.sft\.options\.uid: it would change what the job runs"),
        ("resources.sft.partitoin=x", r"did you mean resources\.sft\.partition"),
        ("resources.sft.node=2", r"resources\.sft\.node: no such key; did you mean resources\.sft\.nodes"),
        ("resources.rhlf.nodes=2", r"did you mean 'resources\.rlhf'"),
        ("sft.lr=fast", "sft.lr = 'fast': expected float, got str"),
        ("sft.iterations=0", "sft.iterations = 0: expected at least 1"),
        ("resources.sft.nodes=0", r"resources\.sft\.nodes = 0: expected at least 1"),
        ("resources.export.nodes=2", "export: this stage is one process"),
        ("sft.paths.output=x", "sft.paths is filled by the launcher"),
    ],
)
def test_a_mistake_is_named_with_its_fix(setting, message):
    with pytest.raises(ConfigError, match=message):
        tables(setting)


def test_file_and_recipe_mistakes_name_the_file(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("[sft\n")
    for call, message in (
        (lambda: tables(files=[bad]), "bad.toml: not TOML"),
        (lambda: tables(files=[tmp_path / "no.toml"]), "no such file"),
        (lambda: tables(recipe="bloom-tinny"), "did you mean 'bloom-tiny'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_every_recipe_builds_and_its_ranks_divide(recipe):
    for pipeline, graph in PIPELINES.items():
        made = tables(recipe=recipe, pipeline=pipeline)
        assert set(made) == set(SECTIONS) - (set(ALL) - set(graph))
        for name, stage in graph.items():
            if stage.trainer:
                ranks = getattr(build_plain("resources", made["resources"]), name).ranks
                assert stage_config(RUN, made, graph, name).data_parallel(ranks) >= 1


def test_merge_and_differences_on_nested_tables():
    old, new = {"a": {"b": 1, "c": {"d": 2}}}, {"a": {"c": {"d": 3}, "e": 4}}
    assert merge(old, new) == {"a": {"b": 1, "c": {"d": 3}, "e": 4}}
    assert old == {"a": {"b": 1, "c": {"d": 2}}}, "layers are not changed"
    assert differences(old, merge(old, new)) == ["a.c.d: 2 -> 3", "a.e: '(absent)' -> 4"]


def test_profile_values_are_checked():
    with pytest.raises(ValueError, match="expected one of local, slurm"):
        Profile(name="x", scheduler="pbs")
    with pytest.raises(ValueError, match="hold strings, got 1"):
        Profile(name="x", scheduler="slurm", environment={"NCCL_IB_TC": 1})


@pytest.mark.parametrize(
    "setting, message",
    [
        ("ppo.kl_coef=1", "no section 'ppo'; did you mean 'rlhf.kl_coef'"),
        ("rm.lr=1", "did you mean 'reward.lr'"),
        ("evaluation.judge=none", "did you mean 'mtbench.judge'"),
        ("resources.PPO.nodes=2", "did you mean 'resources.rlhf'"),
    ],
)
def test_a_stage_is_known_by_its_method_too(setting, message):
    with pytest.raises(ConfigError, match=message):
        tables(setting)


def test_all_mistakes_of_all_sections_are_said_at_once():
    sets = (
        "sft.lr=x",
        "sft.iterations=-1",
        "sft.micro_batch_size=0",
        "rlhf.kl_coef=-1",
        "rlhf.lr=-1",
        "rlhf.bogu=1",
        "data.seed=x",
        "mtbench.judge=foo",
        "mtbench.judge_repeats=0",
        "resources.sft.nodes=0",
        "resources.sft.minutes=-3",
    )
    with pytest.raises(ConfigError) as caught:
        tables(*sets)
    assert len(caught.value.messages) == len(sets), caught.value
    for text in sets:
        key = text.partition("=")[0]
        assert any(
            message.startswith(f"{key}{':' if key.endswith('bogu') else ' = '}") for message in caught.value.messages
        ), key
    assert str(caught.value).startswith(f"{len(sets)} mistakes:\n1. ")
    with pytest.raises(ConfigError) as caught:
        tables("ppo.lr=1", "sft", "sft.paths.output=x")
    assert len(caught.value.messages) == 3


def test_what_may_follow_from_another_mistake_is_not_said():
    """max_new_tokens is wrong by itself; that context_length is below it follows."""
    with pytest.raises(ConfigError) as caught:
        tables("mtbench.max_new_tokens=-1", "mtbench.context_length=100")
    assert [text.partition(":")[0] for text in caught.value.messages] == ["mtbench.max_new_tokens = -1"]
