"""Rendered scripts as text: the committed ones, one site's golden text, and values that try to break out."""

import subprocess

import pytest

from launcher import cluster, submit
from launcher.config import Profile, Resources
from launcher.sbatch import JobRequest, python_here, script
from tests.launcher.stub_project import ROOT
from training.config import ConfigError

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))

GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=nlp
#SBATCH --comment='convoy run=hh-1 stage=rlhf'
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=hh-1.rlhf
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=runs/hh/rlhf/logs/slurm-%j.out
#SBATCH --partition=a100
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=720

# setup
set -euo pipefail
module load cuda/12.4
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # since 22.05 srun gives each task one core unless told

# command
export SUBMITIT_EXECUTOR=slurm
exec .venv/bin/python -m launcher.supervise runs/hh rlhf
"""


def request(**changes) -> JobRequest:
    profile = {"name": "site", "scheduler": "slurm", "partition": "a100", "account": "nlp", "exclusive": True,
               "setup": ["module load cuda/12.4"]}
    fields = {"name": "hh-1.rlhf", "comment": "convoy run=hh-1 stage=rlhf", "output": "runs/hh/rlhf/logs/slurm-%j.out",
              "command": ".venv/bin/python -m launcher.supervise runs/hh rlhf",
              "resources": Resources(nodes=2, gpus_per_node=8, minutes=720)}
    profile.update(changes.pop("profile", {}))
    return JobRequest(**{**fields, **changes}, profile=Profile(**profile))


def test_golden_script_of_a_site():
    assert script(request()) == GOLDEN


def test_committed_scripts_are_what_render_makes():
    made = submit.committed_scripts()
    assert sorted(f"{name}.sbatch" for name in made) == [path.name for path in SCRIPTS]
    for path in SCRIPTS:
        assert path.read_text() == made[path.stem], f"{path}: python -m launcher render --committed"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_committed_scripts_are_bash_and_end_in_exec(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert text.splitlines()[-1] == f'exec "${{CONVOY_PYTHON:-python}}" -m launcher.supervise "$RUN" {path.stem}'
    assert str(ROOT) not in text
    refused = subprocess.run(["bash", path], env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert refused.returncode != 0 and "RUN=runs/<name> sbatch" in refused.stderr


@pytest.mark.parametrize("changes", [{"name": "x\n#SBATCH --uid=0"}, {"comment": "a\rb"},
                                     {"profile": {"partition": "a\n#SBATCH --wrap=id"}}, {"profile": {"account": "a\x00"}}])
def test_a_line_break_in_a_value_is_refused(changes):
    with pytest.raises(ConfigError, match="line break"):
        script(request(**changes))


@pytest.mark.parametrize("value", ["it's", 'a"b', "$(id)", "`id`", "a b", "-x; rm"])
def test_odd_values_stay_one_word_for_the_shell(value):
    line = next(line for line in script(request(profile={"qos": value})).splitlines() if line.startswith("#SBATCH --qos="))
    shown = subprocess.run(["bash", "-c", f"printf %s {line.removeprefix('#SBATCH ')}"], capture_output=True, text=True, check=True).stdout
    assert shown == f"--qos={value}"


def test_whole_nodes_and_gpus_only_where_used():
    text = script(request(resources=Resources(gpus_per_node=0, minutes=10)))
    assert "--exclusive" not in text and "--gpus-per-node" not in text and "--ntasks-per-node=1" in text
    assert "--signal=B:USR1@150" in text, "a quarter of a short limit"


def test_python_is_named_relative_below_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert python_here() == ".venv/bin/python"
    monkeypatch.setattr("sys.executable", "/opt/python")
    assert python_here() == "/opt/python"


@pytest.mark.parametrize("name", sorted(path.stem for path in cluster.CLUSTERS.glob("*.toml")))
def test_every_profile_loads(name):
    assert cluster.load(name).name == name
