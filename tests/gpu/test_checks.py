"""The checks of benchmarks/training/check.py and benchmarks/generation/rollout.py: fast paths
against plain ones, at the sizes that a GPU is used for."""

import pytest

from tests.gpu.conftest import CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


def passes(check, *given) -> None:
    from benchmarks import common

    before = len(common.missed)
    check(*given)
    assert common.missed[before:] == []


@pytest.mark.parametrize("name", ["head", "gelu", "optimizer"])
def test_fast_paths(name):
    from benchmarks.training import check

    passes(getattr(check, name))


@pytest.mark.parametrize("rows", ["whole", "packed"])
def test_compiled_layers(rows):
    from benchmarks.training import check

    passes(check.layers, [rows])


@pytest.mark.parametrize("name", ["kernels", "greedy"])
def test_the_rollout_engine(name):
    from benchmarks.generation import rollout

    passes(getattr(rollout, name), not CUDA)
