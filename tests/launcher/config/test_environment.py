"""What children inherit: no command-line option of Slurm's, no rank of another job, no switch of
Python's."""

import pytest

from launcher.config import environment
from launcher.config.profile import Profile
from launcher.slurm import transaction

SHELL = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "LD_LIBRARY_PATH": "/opt/cuda/lib", "PYTHONPATH": "/opt/lib"}
OPTIONS = {
    "SBATCH_PARTITION": "low",
    "SBATCH_EXPORT": "NONE",
    "SLURM_CLUSTERS": "b",
    "SQUEUE_FORMAT": "%i",
    "SACCT_FORMAT": "JobID",
    "SINFO_PARTITION": "x",
    "SCONTROL_ALL": "1",
    "SALLOC_NO_SHELL": "1",
    "SLURM_TIME_FORMAT": "relative",
    "SRUN_DEBUG": "3",
}
OUTER = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURMD_NODENAME": "n1", "SLURM_STEP_ID": "0"}
RANKS = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "gone",
    "TORCHELASTIC_RUN_ID": "x",
    "PMIX_RANK": "1",
    "OMPI_COMM_WORLD_RANK": "1",
    "CONVOY_ATTEMPT": "3",
}
SWITCHES = {"PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error", "PYTHONINSPECT": "1", "PYTHONSAFEPATH": "1"}
SAID = {
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_WAIT": "30",
    "SLURM_KILL_BAD_EXIT": "0",
    "SLURM_CPU_BIND": "none",
    "SLURM_MPI_TYPE": "pmix",
    "SLURM_LABELIO": "1",
    "SLURM_HOSTFILE": "x",
    "SLURM_EXIT_ERROR": "9",
    "SLURM_SRUN_REDUCE_TASK_EXIT_MSG": "1",
}


@pytest.mark.parametrize("build", [environment.outside, environment.for_sbatch])
def test_commands_and_jobs_get_what_the_shell_means_and_nothing_of_slurm_s_or_another_job_s(build):
    assert build(environ={**SHELL, **OPTIONS, **OUTER, **RANKS, **SWITCHES, **SAID}) == SHELL


def test_a_step_keeps_what_sbatch_set_and_drops_what_srun_would_take_for_options():
    job = {
        **SHELL,
        **OUTER,
        "SRUN_CPUS_PER_TASK": "8",
        "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "SLURM_HINT": "nomultithread",
    }
    kept = environment.for_step(environ={**job, **OPTIONS, **RANKS, **SWITCHES, **SAID})
    assert kept == {name: value for name, value in job.items() if name != "SLURM_STEP_ID"}


def test_a_login_node_s_gpus_are_not_a_job_s():
    assert environment.for_sbatch(environ={"CUDA_VISIBLE_DEVICES": ""}) == {}
    assert environment.outside(environ={"CUDA_VISIBLE_DEVICES": "1"}) == {"CUDA_VISIBLE_DEVICES": "1"}


def test_a_profile_passes_on_what_it_names_and_what_its_setup_sets():
    profile = Profile(
        name="site",
        scheduler="slurm",
        pass_environment=["SBATCH_ACCOUNT", "SLURM_MPI_*"],
        setup=["export SLURM_CPU_BIND=none"],
    )
    shell = {**SHELL, "SBATCH_ACCOUNT": "mine", "SBATCH_PARTITION": "low", "SLURM_MPI_TYPE": "pmix"}
    passed = environment.for_sbatch(profile.passed, shell)
    assert passed == {**SHELL, "SBATCH_ACCOUNT": "mine", "SLURM_MPI_TYPE": "pmix"}
    assert environment.for_step(profile.passed, {"SLURM_CPU_BIND": "none", "SLURM_WAIT": "3"}) == {
        "SLURM_CPU_BIND": "none"
    }
    line = environment.note(profile.passed, shell)
    assert line.startswith("SBATCH_PARTITION in this shell: not passed on") and "pass_environment" in line
    assert environment.note((), SHELL) == ""


@pytest.mark.parametrize("wish", ["SBATCH_EXPORT", "SBATCH_*", "*", "RANK", "SLURM_CLUSTERS", "SLURM_*", "A B", "", 3])
def test_what_would_break_the_launcher_can_t_be_wished_for(wish):
    with pytest.raises(ValueError, match="pass_environment holds"):
        Profile(name="site", scheduler="slurm", pass_environment=[wish])


def test_a_site_s_proxy_never_gets_what_is_for_this_machine():
    loopback = "localhost,127.0.0.1,::1"
    found = environment.outside(environ={"http_proxy": "http://proxy:3128"})
    assert found["no_proxy"] == found["NO_PROXY"] == loopback
    found = environment.for_step(environ={"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "intern.org, localhost"})
    assert found["no_proxy"] == found["NO_PROXY"] == "intern.org,localhost,127.0.0.1,::1"
    assert environment.outside(environ={"all_proxy": "x", "no_proxy": "*"})["no_proxy"] == "*"
    assert environment.outside(environ={"http_proxy": ""}) == {"http_proxy": ""}
    assert environment.direct({"http_proxy": "x", "no_proxy": "a"})["NO_PROXY"] == f"a,{loopback}", "the profile's own"


@pytest.mark.parametrize(
    "printed, number",
    [
        ("12\n", 12),
        ("12;main\n", 12),
        ("Welcome to the Example Supercomputer\n---\n--> Verifying valid host...OK\n12\n", 12),
        ("\x1b[1;32m12;main\x1b[0m\n\nYour budget: 3 h\n", 12),
        ("Submitted batch job 12 on cluster main\n", 12),
        ("12\n12;main\n", 12),
        ("days left: 3\n12\n", 12),
        ("3\n12\n", None),
        ("", None),
        ("job 12 was queued\n", None),
    ],
)
def test_the_id_is_found_in_what_a_site_s_wrapper_prints(printed, number):
    assert transaction.job_id(printed) == number
