"""Rendered scripts as text: the committed ones, one site's golden text, and values that try to
break out."""

import dataclasses
import subprocess

import pytest

from launcher.config import sbatch
from launcher.config.sbatch import SbatchOptions
from launcher.config.sections import Profile, Resources
from launcher.slurm import sites
from launcher.slurm.script import JobRequest, script, supervise_here
from launcher.submit import create
from tests.support.stub_project import ROOT

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
#SBATCH --mem=0
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
set +u
module load cuda/12.4
set -u
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"  # since 22.05 srun gives each task one core unless told

# command
export SUBMITIT_EXECUTOR=slurm
exec .venv/bin/python launcher/run_module.py launcher.job.supervise runs/hh rlhf
"""


PART_OF_A_NODE = """\
#!/bin/bash

# Parameters
#SBATCH --comment='convoy run=hh-1 stage=rlhf'
#SBATCH --constraint='a100&ib'
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:a100:2
#SBATCH --job-name=hh-1.rlhf
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mail-type=FAIL
#SBATCH --mem=250G
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=runs/hh/rlhf/logs/slurm-%j.out
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=B:USR1@90
#SBATCH --spread-job
#SBATCH --time=60

# setup
set -euo pipefail
set +u
command -v module >/dev/null || for file in /etc/profile.d/{modules,lmod,z00_lmod}.sh; do [ -r "$file" ] && . "$file"; done\
  # a batch shell is no login shell
module load cuda/12.4 'odd name'
set -u

# command
export SUBMITIT_EXECUTOR=slurm
exec .venv/bin/python launcher/run_module.py launcher.job.supervise runs/hh rlhf
""".replace("\\\n", "")


def request(**changes) -> JobRequest:
    profile = {
        "name": "site",
        "scheduler": "slurm",
        "partition": "a100",
        "account": "nlp",
        "exclusive": True,
        "setup": ["module load cuda/12.4"],
    }
    fields = {
        "name": "hh-1.rlhf",
        "comment": "convoy run=hh-1 stage=rlhf",
        "output": "runs/hh/rlhf/logs/slurm-%j.out",
        "command": ".venv/bin/python launcher/run_module.py launcher.job.supervise runs/hh rlhf",
        "resources": Resources(nodes=2, gpus_per_node=8, minutes=720),
    }
    profile.update(changes.pop("profile", {}))
    return JobRequest(**{**fields, **changes}, profile=Profile(**profile))


def test_golden_script_of_a_site():
    assert script(request()) == GOLDEN


def test_golden_script_of_an_old_slurm_with_spares_for_a_part_of_each_node():
    """20.11 with select/cons_res: --gres instead of --gpus-per-node, and srun still inherits the cores of a
    task."""
    profile = {
        "partition": "",
        "account": "",
        "setup": [],
        "slurm": "20.11.9",
        "gpu_option": "gres",
        "gpu_type": "a100",
        "mem_gb": 1000,
        "qos": "long",
        "reservation": "course",
        "constraint": "a100&ib",
        "modules": ["cuda/12.4", "odd name"],
        "signal_lead_s": 90,
        "options": {"mail-type": "FAIL", "spread-job": True},
    }
    text = script(request(resources=Resources(nodes=2, spares=1, gpus_per_node=2, minutes=60), profile=profile))
    assert text == PART_OF_A_NODE
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_a_stage_has_options_of_its_own():
    """They win over the profile's; what a stage leaves out is the profile's."""
    site = {"qos": "long", "options": {"nice": 10, "mail-type": "FAIL"}}
    own = {"partition": "low", "qos": "short", "account": "", "options": {"nice": 100, "contiguous": True}}
    lines = script(request(profile=site, resources=Resources(nodes=2, gpus_per_node=8, minutes=720, **own)))
    golden = GOLDEN.replace("--partition=a100", "--partition=low").splitlines()
    more = {"--contiguous", "--mail-type=FAIL", "--nice=100", "--qos=short"}
    assert set(lines.splitlines()) == {*golden, *(f"#SBATCH {option}" for option in more)}


def test_a_new_option_is_one_field(monkeypatch):
    """What a person adds who follows docs/extending.md: a field. Script, checks and a stage's own
    value follow."""
    assert [field.name for field in dataclasses.fields(SbatchOptions)] == [*sbatch.SITE_OPTIONS, "options"]
    monkeypatch.setattr(sbatch, "SITE_OPTIONS", (*sbatch.SITE_OPTIONS, "core_spec"))
    monkeypatch.setattr(SbatchOptions, "core_spec", "", raising=False)
    resources = Resources()
    object.__setattr__(resources, "core_spec", "4")
    assert resources.sbatch_options() == {"core-spec": "4"}
    with pytest.raises(ValueError, match="options.core-spec: the launcher sets it; use core_spec"):
        Resources(options={"core-spec": 4})


@pytest.mark.parametrize(
    "version, exported, option",
    [
        ("18.08.9", False, "--gres=gpu:8"),
        ("21.08.8", False, "--gpus-per-node=8"),
        ("22.05.8", True, "--gpus-per-node=8"),
        ("25.11.0", True, "--gpus-per-node=8"),
        ("", True, "--gpus-per-node=8"),
    ],
)
def test_scripts_follow_the_version_found(version, exported, option):
    text = script(request(profile={"slurm": version}))
    assert ("SRUN_CPUS_PER_TASK" in text) is exported and f"#SBATCH {option}\n" in text


def test_without_a_gpu_gres_nodes_are_whole():
    text = script(request(profile={"gpu_option": "none", "exclusive": False}, resources=Resources(gpus_per_node=4)))
    assert "--exclusive\n" in text and "--mem=0" in text and "gpu" not in text


def test_modules_load_where_the_shell_has_no_module_command_and_unset_variables(tmp_path):
    """A batch shell that is no login shell, with ``set -u`` on: the real bash runs what is
    rendered."""
    profile = {"setup": ['echo "$NOBODY_SET_THIS"'], "modules": ["cuda/12.4"]}
    made = script(request(profile=profile, command="env")).replace("/etc/profile.d", str(tmp_path))
    (tmp_path / "lmod.sh").write_text('module() { export "LOADED=$*"; }\n')
    done = subprocess.run(["bash", "-c", made], env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert done.returncode == 0 and "LOADED=load cuda/12.4\n" in done.stdout, done.stderr


def test_a_module_that_can_t_be_loaded_ends_the_job(tmp_path):
    made = script(request(profile={"setup": [], "modules": ["no/such"]}, command="touch reached")).replace(
        "/etc/profile.d", str(tmp_path)
    )
    done = subprocess.run(
        ["bash", "-c", made], cwd=tmp_path, env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "module" in done.stderr and not (tmp_path / "reached").exists()


def test_committed_scripts_are_what_render_makes():
    made = create.committed_scripts()
    assert sorted(f"{name}.sbatch" for name in made) == [path.name for path in SCRIPTS]
    for path in SCRIPTS:
        assert path.read_text() == made[path.stem], f"{path}: python -m launcher render --committed"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_committed_scripts_are_bash_and_end_in_exec(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    assert text.splitlines()[-1] == f'exec "${{CONVOY_PYTHON:-python}}" -m launcher.job.supervise "$RUN" {path.stem}'
    assert str(ROOT) not in text
    refused = subprocess.run(["bash", path], env={"PATH": "/bin:/usr/bin"}, capture_output=True, text=True)
    assert refused.returncode != 0 and "RUN=runs/<name> sbatch" in refused.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x\n#SBATCH --uid=0"},
        {"comment": "a\rb"},
        {"profile": {"partition": "a\n#SBATCH --wrap=id"}},
        {"profile": {"account": "a\x00"}},
        {"profile": {"reservation": "r\n#SBATCH --wrap=id"}},
        {"profile": {"options": {"nice": "1\n"}}},
        {"profile": {"modules": ["cuda\nid"]}},
    ],
)
def test_a_line_break_in_a_value_is_refused(changes):
    with pytest.raises(ValueError, match="line break"):
        script(request(**changes))


@pytest.mark.parametrize("value", ["it's", 'a"b', "$(id)", "`id`", "a b", "-x; rm"])
def test_odd_values_stay_one_word_for_the_shell(value):
    line = next(
        line for line in script(request(profile={"qos": value})).splitlines() if line.startswith("#SBATCH --qos=")
    )
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {line.removeprefix('#SBATCH ')}"], capture_output=True, text=True, check=True
    ).stdout
    assert shown == f"--qos={value}"


def test_whole_nodes_and_gpus_only_where_used():
    text = script(request(resources=Resources(gpus_per_node=0, minutes=10)))
    assert "--exclusive" not in text and "--gpus-per-node" not in text and "--ntasks-per-node=1" in text
    assert "--signal=B:USR1@150" in text, "a quarter of a short limit"


def test_python_is_named_relative_below_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.chdir(tmp_path)
    assert supervise_here()[0] == ".venv/bin/python"
    monkeypatch.setattr("sys.executable", "/opt/python")
    assert supervise_here()[0] == "/opt/python"


@pytest.mark.parametrize("name", sorted(path.stem for path in sites.CLUSTERS.glob("*.toml")))
def test_every_profile_loads(name):
    assert sites.load(name).name == name
