"""The environment of every process that the launcher starts: what the run means, not what a shell
happens to hold.

A command calls Slurm and helper processes (``outside``). sbatch stores the environment that it is
called with, and each job of the chain gets it (``for_sbatch``). Inside a job srun passes its own on
to the ranks (``for_step``). None of them inherits:

- Slurm's variables. Those of sbatch, srun, squeue, sinfo and sacct win over options, or reshape
  what is printed and read. Those of an outer job name nodes and tasks of that job.
- How ranks meet: RANK, WORLD_SIZE, MASTER_ADDR and what torchrun and MPI add. The launcher sets
  them.
- Python's switches that change what a program does: PYTHONOPTIMIZE removes asserts and docstrings.

Requests to this machine never go to a proxy. A profile's ``pass_environment`` lets a name through.
Standard library only.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable, Mapping

KEYS = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
"""Names of variables that hold a secret."""
READERS = "SBATCH|SALLOC|SQUEUE|SINFO|SACCT|SACCTMGR|SCANCEL|SCONTROL|SSTAT|SPRIO|SREPORT|SSHARE|SCRONTAB|STRIGGER"
SLURM = re.compile(rf"({READERS}|SRUN|SLURM|SLURMD|SLURMSTEPD)_\w+")
"""Variables that Slurm's commands read or set."""
ADDRESSES = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_SOCKET"}
"""Where the cluster is, and as whom it is asked: every command keeps them."""
RENDEZVOUS = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|NODE_RANK|GROUP_RANK|GROUP_WORLD_SIZE|ROLE_\w+|MASTER_ADDR"
    r"|MASTER_PORT|(TORCHELASTIC|PET|OMPI_COMM_WORLD|PMI|PMIX|MPI_LOCALRANKID)\w*|CONVOY_(ATTEMPT|WORDS)"
)
SWITCHES = {
    f"PYTHON{name}"
    for name in (
        "OPTIMIZE",
        "INSPECT",
        "STARTUP",
        "SAFEPATH",
        "WARNINGS",
        "DEVMODE",
        "DEBUG",
        "VERBOSE",
        "PROFILEIMPORTTIME",
        "DUMPREFS",
        "DUMPREFSFILE",
        "MALLOC",
        "MALLOCSTATS",
        "TRACEMALLOC",
        "ASYNCIODEBUG",
        "CASEOK",
        "IOENCODING",
        "LEGACYWINDOWSSTDIO",
        "BREAKPOINT",
        "INTMAXSTRDIGITS",
        "NODEBUGRANGES",
        "PERFSUPPORT",
        "EXECUTABLE",
        "UTF8",
        "COERCECLOCALE",
        "_GIL",
        "_CPU_COUNT",
    )
}
GPUS = {"CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"}
"""Of the login node: a job's own are set by Slurm."""
STEP = re.compile(
    r"SLURM_(EXPORT_ENV|WAIT|KILL_BAD_EXIT|LABELIO|UNBUFFEREDIO|STD(IN|OUT|ERR)MODE|OPEN_MODE|DISABLE_STATUS|SRUN_\w+"
    r"|STEP_\w+|STEPID|OVERLAP|EXACT|EXCLUSIVE|WHOLE|NO_KILL|IMMEDIATE|TIMELIMIT|DEPENDENCY|PROLOG|EPILOG|TASK_PROLOG"
    r"|TASK_EPILOG|REMOTE_CWD|WORKING_DIR|TEST_EXEC|THREADS|GRES|TRES_BIND|HOSTFILE|ARBITRARY_NODELIST|EXIT_\w+"
    r"|NCORES_PER_SOCKET|NSOCKETS_PER_NODE|PARTITION|ACCOUNT|QOS|CONSTRAINT|CLUSTERS|CLUSTER_CONSTRAINT|DEBUG"
    r"|DEBUG_FLAGS|BCAST\w*|SEND_LIBS|COMPRESS|SPREAD_JOB|USE_MIN_NODES|REQ_SWITCH|WAIT4SWITCH|RESV_PORTS|SIGNAL"
    r"|MPI_TYPE|CPU_BIND\w*|MEM_BIND\w*|PMI\w*|PTY_\w+|LAUNCH_NODE_IPADDR|TIME_FORMAT|BITSTR_LEN)"
    rf"|({READERS})_\w+|SRUN_(?!CPUS_PER_TASK)\w+"
)
"""Inside a job: what srun would take for options of its own. The rest of SLURM_* is what sbatch
set."""
FIXED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "CONVOY_ATTEMPT",
    "SLURM_CLUSTERS",
    "SBATCH_CLUSTERS",
    "SBATCH_WAIT",
    "SBATCH_ARRAY_INX",
    "SBATCH_EXPORT",
    "SBATCH_NO_REQUEUE",
    "SBATCH_IGNORE_PBS",
    "SLURM_EXPORT_ENV",
    "SRUN_EXPORT_ENV",
    "SLURM_WAIT",
    "SLURM_KILL_BAD_EXIT",
    "SLURM_LABELIO",
    "SLURM_STDOUTMODE",
    "SLURM_STDERRMODE",
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_JOB_NODELIST",
    "SLURM_TIME_FORMAT",
    "SLURM_SRUN_REDUCE_TASK_EXIT_MSG",
    "SQUEUE_FORMAT",
    "SINFO_FORMAT",
    "SACCT_FORMAT",
    "SCONTROL_ALL",
)
"""No profile passes these on: what Slurm prints could not be read, or ranks would not meet."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def outside(passed: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For Slurm's commands and for helpers, also inside a job: nothing of that job."""
    return _without(environ, lambda name: SLURM.fullmatch(name) and name not in ADDRESSES, passed)


def for_sbatch(passed: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For sbatch, which hands it on to the job. ``passed``: names, or patterns like SLURM_MPI_*."""
    return _without(outside(passed, environ), GPUS.__contains__, passed)


def for_step(passed: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """For srun inside a job."""
    return _without(environ, STEP.fullmatch, passed)


def dropped(passed: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of the shell's variables that neither Slurm nor a job gets, except those of an outer
    job."""
    names = set(environ) - set(for_sbatch(passed, environ))
    return sorted(name for name in names if not ("SLURM_JOB_ID" in environ and name.startswith("SLURM")))


def note(passed: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> str:
    """What ``plan`` and ``doctor`` say of the shell; "" where nothing is dropped."""
    names = dropped(passed, environ)
    return (
        (
            f"{', '.join(names)} in this shell: not passed on to Slurm, its jobs or the ranks. What the site needs of "
            'it goes into the profile: partition, account, options, or pass_environment = ["NAME"]'
        )
        if names
        else ""
    )


def fixed(wish: str) -> str:
    """A variable among ``wish`` (a name, or PREFIX*) that no profile may pass on; "" without
    one."""
    return next((name for name in FIXED if fnmatch.fnmatchcase(name, wish)), "")


def _without(environ: Mapping[str, str], unwanted: Callable[[str], object], passed: Iterable[str]) -> dict[str, str]:
    """``environ`` less ``unwanted(name)`` and what no process of ours inherits; loopback has no
    proxy."""

    def wished(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, wish) for wish in passed)

    passed_on = {
        name: value
        for name, value in environ.items()
        if wished(name) or not (unwanted(name) or RENDEZVOUS.fullmatch(name) or name in SWITCHES)
    }
    return direct(passed_on)


def direct(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` with the loopback addresses in no_proxy and NO_PROXY, where the site has a
    proxy."""
    if not any(value for name, value in environ.items() if name.lower() in PROXIES):
        return dict(environ)
    texts = [environ.get(name, "") for name in ("no_proxy", "NO_PROXY")]
    hosts = [host.strip() for text in texts for host in text.split(",") if host.strip()]
    value = "*" if "*" in hosts else ",".join(dict.fromkeys([*hosts, *LOOPBACK]))
    return {**environ, "no_proxy": value, "NO_PROXY": value}
