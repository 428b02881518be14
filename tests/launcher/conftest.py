import pytest

from tests.support.stub_project import Project


@pytest.fixture
def project(tmp_path):
    """A project whose stages are stubs; there is no Slurm for it."""
    return Project(tmp_path)
