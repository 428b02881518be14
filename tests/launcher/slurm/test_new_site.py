"""A new site is two TOML files: plan, scripts and the environment of a job follow from them."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from launcher import plan
from launcher.config.network import Network
from launcher.config.profile import Machine
from launcher.config.sections import differences
from launcher.estimates import step_time
from launcher.run.folder import Run
from launcher.slurm import network, site_files, sites
from launcher.submit import create
from training.errors import ConfigError

PROFILE = """\
scheduler = "slurm"
network = "{network}"
gpu = "h100"
partition = "fast"
gpus_per_node = 8
gpu_memory_gb = 85.0
max_nodes = 4
"""
NETWORK = """\
outside_gb_s = 12.5

[variables.NCCL_IB_HCA]
value = "=fast0,fast1"
reason = "the other adapters serve storage"
"""


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(folder: Path) -> str:
    for kind, text in (("clusters", PROFILE.format(network="new")), ("networks", NETWORK)):
        (folder / "slurm" / kind).mkdir(parents=True)
        (folder / "slurm" / kind / "new.toml").write_text(text)
    return "new"


def by_path(folder: Path) -> str:
    (folder / "sites").mkdir()
    (folder / "sites/new.toml").write_text(PROFILE.format(network="fabric.toml"))
    (folder / "sites/fabric.toml").write_text(NETWORK)
    return "sites/new.toml"


def planned(name: str) -> create.Plan:
    sets = ("resources.sft.nodes=2", "resources.sft.gpus_per_node=8", "sft.global_batch_size=64")
    site = sites.load(name), "as asked"
    return create.plan(create.SubmitRequest("full-pipeline", "bloom-tiny", Path("runs"), *site, sets=sets, last="sft"))


@pytest.mark.parametrize("write", [by_name, by_path])
def test_a_site_of_two_files(nowhere, write):
    name = write(nowhere)
    made = planned(name)
    assert step_time.machine_of(made.profile) == Machine(
        tflops=989, memory_gb_s=3350, inside_gb_s=450, outside_gb_s=12.5
    )
    out = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - nothing is written
    plan.suggest(made, out)
    assert "sft: on paper" in out.export_text()
    assert "#SBATCH --partition=fast\n" in plan.scripts_of(made)["sft"]

    run = create.create(made)
    path = site_files.find("networks", made.profile.network, Path("sites"))
    path.write_text(NETWORK.replace("fast0,", ""))
    line = ("NCCL_IB_HCA", "=fast0,fast1", "the other adapters serve storage")
    assert line in network.environment(Run(run.folder).profile, 8), "as the run was submitted"

    changed = differences(dataclasses.asdict(made.profile), dataclasses.asdict(sites.load(name)))
    assert changed == ["network_table.variables.NCCL_IB_HCA.value: '=fast0,fast1' -> '=fast1'"]


def test_a_network_that_is_missing_or_wrong_is_named_with_the_fix(nowhere):
    (nowhere / "mine.toml").write_text(PROFILE.format(network="h800-roc"))
    with pytest.raises(
        ConfigError, match="mine.toml: network = 'h800-roc': expected one of .*did you mean 'h800-roce'"
    ):
        sites.load("mine.toml")
    (nowhere / "mine.toml").write_text(PROFILE.format(network="fabric.toml"))
    with pytest.raises(ConfigError, match="network = 'fabric.toml': .* a file next to the profile"):
        sites.load("mine.toml")
    for text, message in (
        ("outside_gbs = 1", r"network fabric\.outside_gbs: no such key; did you mean network fabric\.outside_gb_s"),
        ("outside_gb_s = -1", r"outside_gb_s = -1.0: expected a rate"),
        ("variables = { X = 1 }", r"variables\.X = 1: expected a table, \{ value ="),
        ('variables = { A_TOKEN = { value = "x", reason = "y" } }', r"variables\.A_TOKEN: it is printed in the log"),
    ):
        (nowhere / "fabric.toml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            sites.load("mine.toml")
    (nowhere / "mine.toml").write_text(PROFILE.format(network="auto").replace("h100", "h1000"))
    with pytest.raises(ConfigError, match=r"gpu = 'h1000': expected one of a100, .* table \[machine\]"):
        sites.load("mine.toml")
    (nowhere / "mine.toml").write_text(PROFILE.format(network="auto") + "[network_table]\noutside_gb_s = 1\n")
    with pytest.raises(ConfigError, match="network_table is filled by the launcher"):
        sites.load("mine.toml")


def test_a_profile_without_a_network_has_the_variables_of_every_site():
    assert network.variables(Network()) == list(network.ALWAYS)
