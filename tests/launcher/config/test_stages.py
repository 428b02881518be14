"""The graph: order, selection, what is left."""

import pytest

from launcher.config.stages import FULL, NAMES, PIPELINES, remaining, select
from training.errors import ConfigError

PPO = PIPELINES["ppo"]
ORDER = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]


def names(stages):
    return [stage.name for stage in stages]


def test_parents_come_before_their_children():
    assert list(PPO) == ORDER and list(PIPELINES["dpo"]) == ["convert", "sft", "dpo", "export", "mtbench"]
    for graph in PIPELINES.values():
        order = list(graph)
        assert all(order.index(parent) < order.index(name) for name, stage in graph.items() for parent in stage.parents)
        assert sorted(order, key=NAMES.index) == order


@pytest.mark.parametrize(
    "first, last, expected",
    [(None, None, ORDER), ("reward", None, ORDER[2:]), (None, "sft", ORDER[:2]), ("sft", "sft", ["sft"])],
)
def test_from_and_until_cut_the_chain(first, last, expected):
    assert names(select(PPO, FULL, first, last)) == expected


def test_contradicting_selections_are_refused():
    with pytest.raises(ConfigError, match="--from rlhf comes after --until sft"):
        select(PPO, FULL, "rlhf", "sft")
    with pytest.raises(ConfigError, match="sft is a single stage"):
        select(PPO, "sft", None, "rlhf")
    with pytest.raises(
        ConfigError,
        match="rlhf is no stage of this pipeline .convert -> sft -> dpo -> export -> mtbench.; it is one of "
        "--pipeline ppo, in a run of its own",
    ):
        select(PIPELINES["dpo"], FULL, "rlhf", None)


BUILT = {"convert": {}, "sft": {"convert": "C"}, "reward": {"sft": "S"}, "rlhf": {"sft": "S", "reward": "R"}}


def test_what_is_done_is_not_left():
    done = {"convert": "C", "sft": "S", "reward": "R", "rlhf": "P"}
    assert names(remaining(PPO, PPO.values(), done, BUILT)) == ["export", "mtbench"]
    assert names(remaining(PPO, select(PPO, FULL, None, "sft"), done, BUILT)) == []


def test_a_changed_parent_makes_all_that_was_built_from_it_left():
    done = {"convert": "C", "sft": "S2", "reward": "R", "rlhf": "P"}
    assert names(remaining(PPO, PPO.values(), done, BUILT)) == ORDER[2:]


def test_a_child_whose_parent_lost_its_manifest_is_left():
    assert names(remaining(PPO, PPO.values(), {"convert": "C", "reward": "R"}, BUILT)) == ORDER[1:]
