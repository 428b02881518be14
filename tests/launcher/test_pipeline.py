"""The graph: order, selection, what is left."""

import pytest

from launcher.pipeline import FULL, STAGES, remaining, select
from training.settings import ConfigError

NAMES = ["convert", "sft", "reward", "rlhf", "export", "mtbench"]


def names(stages):
    return [stage.name for stage in stages]


def test_parents_come_before_their_children():
    assert list(STAGES) == NAMES
    assert all(NAMES.index(parent) < NAMES.index(name) for name, stage in STAGES.items() for parent in stage.parents)


@pytest.mark.parametrize("first, last, expected", [(None, None, NAMES), ("reward", None, NAMES[2:]), (None, "sft", NAMES[:2]),
                                                   ("sft", "sft", ["sft"])])
def test_from_and_until_cut_the_chain(first, last, expected):
    assert names(select(FULL, first, last)) == expected


def test_contradicting_selections_are_refused():
    with pytest.raises(ConfigError, match="--from rlhf comes after --until sft"):
        select(FULL, "rlhf", "sft")
    with pytest.raises(ConfigError, match="sft is a single stage"):
        select("sft", None, "rlhf")


BUILT = {"convert": {}, "sft": {"convert": "C"}, "reward": {"sft": "S"}, "rlhf": {"sft": "S", "reward": "R"}}


def test_what_is_done_is_not_left():
    done = {"convert": "C", "sft": "S", "reward": "R", "rlhf": "P"}
    assert names(remaining(STAGES.values(), done, BUILT)) == ["export", "mtbench"]
    assert names(remaining(select(FULL, None, "sft"), done, BUILT)) == []


def test_a_changed_parent_makes_all_that_was_built_from_it_left():
    done = {"convert": "C", "sft": "S2", "reward": "R", "rlhf": "P"}
    assert names(remaining(STAGES.values(), done, BUILT)) == NAMES[2:]


def test_a_child_whose_parent_lost_its_manifest_is_left():
    assert names(remaining(STAGES.values(), {"convert": "C", "reward": "R"}, BUILT)) == NAMES[1:]
