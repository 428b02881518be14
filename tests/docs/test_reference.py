"""The generated pages of the reference are what the code says."""

import importlib.util

import pytest

from launcher.config.network import Fits, Network
from launcher.config.profile import Container, Machine, Profile
from launcher.config.sections import SECTIONS, Resources
from tests.support.programs import ROOT, programs

spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
CONFIGS = [
    *(config for name, config in SECTIONS.items() if name != "resources"),
    Resources,
    Profile,
    Machine,
    Container,
    Network,
    Fits,
]


def test_the_pages_are_what_the_code_says():
    stale = [str(page.relative_to(ROOT)) for page in reference.stale()]
    assert not stale, f"run python docs/reference.py (make docs) and commit {', '.join(stale)}"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_key_has_a_doc_line(config):
    missing = set(reference.fields(config)) - set(reference.field_docs(config))
    assert not missing, f"write a string after {', '.join(sorted(missing))} of {config.__name__}: meaning and unit"


def test_every_program_is_on_the_page():
    typed = {program.split()[0] for program in reference.TYPED}
    listed = {name.removesuffix(".__main__") for name in typed | set(reference.STARTED)}
    exist = {name.removesuffix(".__main__") for name in programs()} - {"launcher"}
    assert listed == exist
