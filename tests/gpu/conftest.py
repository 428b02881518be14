"""What needs a GPU: ``make gpu-test``. Where there is none that command tries what a CPU can, on
tiny shapes; other runs skip it."""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not CUDA and os.environ.get("CONVOY_GPU") != "1":
            item.add_marker(pytest.mark.skip(reason="no GPU here (make gpu-test)"))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    """The process group of one rank, in this process: a child of a process that has used CUDA can't
    use it."""
    from training.distributed import groups

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with groups.ranks(1, 1, 1, init_method=f"file://{tmp_path_factory.mktemp('group')}/store"):
        yield
